// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the programs of the benchmark share: rows, what is counted for them, memory to measure with.

pub mod counting;
pub mod measure;
pub mod pages;
pub mod tasks;
