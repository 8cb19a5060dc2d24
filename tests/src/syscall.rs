// SPDX-License-Identifier: MIT OR Apache-2.0
//! System calls from Dune mode.

use crate::framework::Test;

pub const TESTS: &[Test] = &[];
