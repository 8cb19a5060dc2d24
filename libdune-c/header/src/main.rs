// SPDX-License-Identifier: MIT OR Apache-2.0

//! Writes `include/libdune/dune.h` from the sources of libdune-c; with `--check` says whether it is what they give.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let check = std::env::args().nth(1).is_some_and(|argument| argument == "--check");
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let Some(library) = own.parent() else {
        return ExitCode::FAILURE;
    };
    let header = library.join("include/libdune/dune.h");
    let configuration = match cbindgen::Config::from_file(library.join("cbindgen.toml")) {
        Ok(configuration) => configuration,
        Err(error) => return fail(&error),
    };
    let mut builder = cbindgen::Builder::new().with_config(configuration);
    // File by file, in the order of lib.rs: the header's.
    let Ok(root) = std::fs::read_to_string(library.join("src/lib.rs")) else {
        return fail(&"libdune-c/src/lib.rs cannot be read");
    };
    for module in root
        .lines()
        .filter_map(|line| line.strip_prefix("mod ")?.strip_suffix(';'))
    {
        builder = builder.with_src(library.join(format!("src/{module}.rs")));
    }
    let bindings = match builder.generate() {
        Ok(bindings) => bindings,
        Err(error) => return fail(&error),
    };
    if !check {
        bindings.write_to_file(&header);
        return ExitCode::SUCCESS;
    }
    let mut text = Vec::new();
    bindings.write(&mut text);
    match std::fs::read(&header) {
        Ok(committed) if committed == text => ExitCode::SUCCESS,
        _ => fail(&"libdune/dune.h is not what libdune-c/src gives: run `cargo run -p dune-header`"),
    }
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("dune-header: {error}");
    ExitCode::FAILURE
}
