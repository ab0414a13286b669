//! How the program is linked: static, where this machine has what that takes.
//!
//! A command is a process of some milliseconds, and the loader's share of that (four libraries to find, map and bind) is as large as all that many a command does
//! itself. A static program also starts on a host, in a container or in an initramfs of any distribution. `-C target-feature=+crt-static`, which is
//! what this does, cannot be asked for by a package: without `--target` it would be meant for the procedural macros too, which cannot be static.
//!
//! So the linker is told `-static-pie`, and finds, before the system's libraries, scripts of the same names that refer it to the static ones. Whatever is missing
//! or asks for something else (another C library, a cross build, no static libraries, flags about linking, `FORKDISK_LINK=dynamic`) leaves the usual, dynamic program.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

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

/// A C library before 2.34 has its threads in a library of their own, of which a static program may get only half: functions that nobody asks for by name.
const OLD: &str = "libpthread.so";

/// Words in flags of the compiler (`RUSTFLAGS`) that mean another way of linking.
const OTHER_WAYS: [&str; 6] = [
    "relocation-model",
    "prefer-dynamic",
    "sanitizer",
    "linker",
    "link-arg",
    "profile-generate",
];

fn main() {
    println!("cargo::rerun-if-changed=tools/link.rs");
    println!("cargo::rerun-if-env-changed=FORKDISK_LINK");
    let var = |name: &str| env::var(name).unwrap_or_default();
    let features = var("CARGO_CFG_TARGET_FEATURE");
    let usual = var("FORKDISK_LINK") == "dynamic"
        || var("CARGO_CFG_TARGET_OS") != "linux"
        || var("CARGO_CFG_TARGET_ENV") != "gnu"
        || var("HOST") != var("TARGET")
        || OTHER_WAYS.iter().any(|way| var("CARGO_ENCODED_RUSTFLAGS").contains(way))
        // It is static anyway.
        || features.split(',').any(|feature| feature == "crt-static");
    let linker = env::var("RUSTC_LINKER").unwrap_or("cc".to_string());
    let out = var("OUT_DIR");
    if usual || find(&linker, OLD).is_some() {
        return;
    }
    for file in NEEDED {
        let Some(path) = find(&linker, file) else {
            return;
        };
        println!("cargo::rerun-if-changed={}", path.display());
    }
    if !scripts(Path::new(&out)) || !links(&linker, &out) {
        return;
    }
    // Only for the program: tests and benches take the libraries as they come.
    for argument in ["-static-pie", &format!("-L{out}")] {
        println!("cargo::rustc-link-arg-bin=forkdisk={argument}");
    }
}

/// Where the compiler that links knows this file to be: where it knows nothing it answers with the bare name.
fn find(linker: &str, file: &str) -> Option<PathBuf> {
    let output = Command::new(linker)
        .arg(format!("-print-file-name={file}"))
        .output()
        .ok()?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    (output.status.success() && path.is_absolute() && path.exists()).then_some(path)
}

/// Whether a small program can be linked like that, and runs.
fn links(linker: &str, out: &str) -> bool {
    let small = Path::new(out).join("small");
    let source = small.with_extension("c");
    if fs::write(
        &source,
        "#include <math.h>\nint main(int n, char **a) { (void)a; return floor(n) != 1; }\n",
    )
    .is_err()
    {
        return false;
    }
    let linked = Command::new(linker)
        .arg(&source)
        .arg("-o")
        .arg(&small)
        .args([
            "-static-pie",
            &format!("-L{out}"),
            "-Wl,-Bdynamic",
            "-lgcc_s",
            "-lm",
            "-lc",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let works =
        |status: std::io::Result<std::process::ExitStatus>| status.is_ok_and(|s| s.success());
    works(linked) && works(Command::new(&small).stdin(Stdio::null()).status())
}

/// Whether the scripts could be written.
fn scripts(dir: &Path) -> bool {
    let mut written = LIBRARIES
        .iter()
        .map(|(name, script)| fs::write(dir.join(name), script));
    written.all(|result| result.is_ok())
}
