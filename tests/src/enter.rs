// SPDX-License-Identifier: MIT OR Apache-2.0
//! Entering and leaving Dune mode.

use crate::framework::Test;

pub const TESTS: &[Test] = &[];
