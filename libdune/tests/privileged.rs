// SPDX-License-Identifier: MIT OR Apache-2.0

//! What must not compile: privileged operations without the token of a thread in Dune mode, and lost flushes.

#[test]
fn misuse_does_not_compile() {
    trybuild::TestCases::new().compile_fail("tests/privileged/*.rs");
}
