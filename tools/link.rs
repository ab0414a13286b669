//! How the program is linked: static, where this machine has what that takes.
//!
//! A command is a process of some milliseconds, and the loader's share of that (four libraries to find, map and bind) is as large as all that many a command does
//! itself. A static program also starts on a host, in a container or in an initramfs of any distribution. `-C target-feature=+crt-static`, which is
//! what this does, cannot be asked for by a package: without `--target` it would be meant for the procedural macros too, which cannot be static.
//!
//! So the linker is told `-static-pie`, and finds, before the system's libraries, scripts of the same names that refer it to the static ones. Whatever is missing
//! (another C library, a cross build, no static libraries, `FORKDISK_LINK=dynamic`) leaves the usual, dynamic program.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

/// What the standard library asks for, and what it gets. The C library and the unwinder need each other.
const LIBRARIES: [(&str, &str); 3] = [
    (
        "libgcc_s.so",
        "GROUP ( -l:libgcc_eh.a -l:libgcc.a -l:libc.a )\n",
    ),
    ("libm.so", "INPUT ( -l:libm.a )\n"),
    ("libc.so", "GROUP ( -l:libc.a -l:libgcc_eh.a )\n"),
];

/// What a static program is linked of: the start of one that may be loaded anywhere, and the libraries.
const NEEDED: [&str; 5] = ["rcrt1.o", "libc.a", "libm.a", "libgcc.a", "libgcc_eh.a"];

fn main() {
    println!("cargo::rerun-if-changed=tools/link.rs");
    println!("cargo::rerun-if-env-changed=FORKDISK_LINK");
    let var = |name: &str| env::var(name).unwrap_or_default();
    let features = var("CARGO_CFG_TARGET_FEATURE");
    let usual = var("FORKDISK_LINK") == "dynamic"
        || var("CARGO_CFG_TARGET_OS") != "linux"
        || var("CARGO_CFG_TARGET_ENV") != "gnu"
        || var("HOST") != var("TARGET")
        // It is static anyway.
        || features.split(',').any(|feature| feature == "crt-static");
    let linker = env::var("RUSTC_LINKER").unwrap_or("cc".to_string());
    let out = var("OUT_DIR");
    if usual || !NEEDED.iter().all(|file| finds(&linker, file)) || !scripts(Path::new(&out)) {
        return;
    }
    // Only for the program: tests and benches take the libraries as they come.
    for argument in ["-static-pie", &format!("-L{out}")] {
        println!("cargo::rustc-link-arg-bin=forkdisk={argument}");
    }
}

/// Whether the compiler that links knows where this file is: else it answers with the bare name.
fn finds(linker: &str, file: &str) -> bool {
    let output = Command::new(linker)
        .arg(format!("-print-file-name={file}"))
        .output();
    output.is_ok_and(|output| {
        let path = String::from_utf8_lossy(&output.stdout);
        let path = Path::new(path.trim());
        output.status.success() && path.is_absolute() && path.exists()
    })
}

/// Whether the scripts could be written.
fn scripts(dir: &Path) -> bool {
    let mut written = LIBRARIES
        .iter()
        .map(|(name, script)| fs::write(dir.join(name), script));
    written.all(|result| result.is_ok())
}
