// SPDX-License-Identifier: MIT OR Apache-2.0

//! Gives libdune.so its name, which programs look for at run time wherever they found it when they were linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libdune.so");
}
