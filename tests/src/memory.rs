// SPDX-License-Identifier: MIT OR Apache-2.0
//! EPT and guest page tables follow the process' memory.

use crate::framework::Test;

pub const TESTS: &[Test] = &[];
