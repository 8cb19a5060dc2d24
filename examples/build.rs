// SPDX-License-Identifier: MIT OR Apache-2.0

//! Builds the plugins: shared objects from C, without any library.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=plugin");
    println!("cargo:rerun-if-env-changed=CC");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    for name in ["good", "hostile"] {
        let status = Command::new(&compiler)
            .args([
                "-shared",
                "-fPIC",
                "-nostdlib",
                "-ffreestanding",
                "-fno-stack-protector",
            ])
            .args(["-O2", "-Wall", "-Werror", "-Wl,-z,noexecstack,--hash-style=gnu"])
            .arg(format!("plugin/{name}.c"))
            .arg("-o")
            .arg(out.join(format!("{name}.so")))
            .status();
        match status {
            Ok(status) if status.success() => {}
            Ok(status) => panic!("{compiler} for plugin/{name}.c: {status}"),
            Err(error) => panic!("{compiler}: {error}; set CC to a C compiler"),
        }
    }
}
