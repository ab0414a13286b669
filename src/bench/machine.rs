//! On what it was measured.

use crate::{
    bench::{peers, work::Work},
    sys::mounts,
};
use serde::Serialize;
use std::{fs, os::unix::fs::MetadataExt};

/// A description of the machine and of the tools.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Machine {
    /// `6.18.44`.
    pub kernel: String,
    /// Model of the processors.
    pub processor: String,
    /// How many.
    pub processors: usize,
    /// Bytes.
    pub memory: u64,
    /// Of the directory in which it was measured.
    pub filesystem: String,
    /// The device under it.
    pub device: String,
    /// Was the page cache dropped, or only our own files in it?
    pub drops_caches: bool,
    /// Of forkdisk.
    pub version: String,
    /// `fio-3.33`, if there is one.
    pub fio: Option<String>,
    /// Of the storage daemon.
    pub qemu: Option<String>,
}

/// Looks at the machine.
pub fn describe(work: &Work) -> Machine {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let value = |text: &str, name: &str| {
        let line = text.lines().find(|l| l.starts_with(name));
        let value = line.and_then(|l| l.split_once(':'));
        value.map_or(String::new(), |v| v.1.trim().to_string())
    };
    let memory = value(&read("/proc/meminfo"), "MemTotal");
    let memory = memory
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok());
    let dev = fs::metadata(work.path("")).map_or(0, |m| m.dev());
    let number = (rustix::fs::major(dev), rustix::fs::minor(dev));
    let mounts = mounts::list().unwrap_or_default();
    let here = mounts.iter().rev().find(|m| m.device == number);
    let first_line = |program: &str| {
        let mut command = work.command(program);
        command.arg("--version");
        let text = work.short(command).ok()?;
        text.lines().next().map(str::to_string)
    };
    Machine {
        kernel: read("/proc/sys/kernel/osrelease").trim().to_string(),
        processor: value(&read("/proc/cpuinfo"), "model name"),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        memory: memory.unwrap_or(0u64) * 1024,
        filesystem: here.map_or(String::new(), |m| m.fs_type.clone()),
        device: here.map_or(String::new(), |m| m.source.to_string_lossy().into_owned()),
        drops_caches: rustix::process::geteuid().is_root(),
        version: env!("CARGO_PKG_VERSION").to_string(),
        fio: first_line("fio"),
        qemu: peers::qemu_version(work).and_then(|_| first_line("qemu-storage-daemon")),
    }
}
