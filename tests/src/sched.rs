// SPDX-License-Identifier: MIT OR Apache-2.0
//! Preemption, migration, signals, other processes.

use crate::framework::Test;

pub const TESTS: &[Test] = &[];
