// SPDX-License-Identifier: MIT OR Apache-2.0
//! Exceptions taken in Dune mode.

use crate::framework::Test;

pub const TESTS: &[Test] = &[];
