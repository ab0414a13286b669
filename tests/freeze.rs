//! A filesystem that was frozen for a snapshot goes on, whatever happens to who froze it.
//!
//! Needs root, to mount a filesystem of its own; says so where it is not.

use forkdisk::sys::{freeze::freeze, idle::is_idle};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

/// A small filesystem, mounted until this is dropped.
struct Mounted {
    dir: PathBuf,
    _all: tempfile::TempDir,
}

impl Mounted {
    fn new() -> Option<Mounted> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("NOT RUN: mounting needs root");
            return None;
        }
        let all = tempfile::tempdir().expect("a directory");
        let (image, dir) = (all.path().join("image"), all.path().join("mnt"));
        std::fs::create_dir(&dir).expect("a directory");
        let file = std::fs::File::create(&image).expect("an image");
        file.set_len(32 << 20).expect("a size");
        must("mkfs.ext4", &["-q".as_ref(), &image]);
        must("mount", &["-o".as_ref(), "loop".as_ref(), &image, &dir]);
        Some(Mounted { dir, _all: all })
    }
}

impl Drop for Mounted {
    /// Waits for who still has the filesystem open: the guard of a freeze whose owner was killed is no
    /// child of this process and closes its descriptor some moments after it thawed, and a command
    /// that a test beside this one starts holds all descriptors until it is executed.
    fn drop(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let got = Command::new("umount").arg(&self.dir).output();
            let got = got.expect("umount runs");
            if got.status.success() {
                return;
            }
            let why = String::from_utf8_lossy(&got.stderr).into_owned();
            assert!(
                why.contains("busy") && Instant::now() < deadline,
                "umount failed: {why}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn must(program: &str, args: &[&Path]) {
    let status = Command::new(program).args(args).status();
    assert!(status.is_ok_and(|s| s.success()), "{program} failed");
}

/// Writes in a thread of its own, and tells whether it is done within `patience`.
fn writes_within(dir: &Path, patience: Duration) -> (bool, std::thread::JoinHandle<()>) {
    let file = dir.join("file");
    let writer = std::thread::spawn(move || std::fs::write(file, "x").expect("written"));
    let end = Instant::now() + patience;
    while !writer.is_finished() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    (writer.is_finished(), writer)
}

#[test]
fn writers_wait_while_it_is_frozen_and_go_on_after() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let frozen = freeze(&mounted.dir).expect("frozen");
    let (done, writer) = writes_within(&mounted.dir, Duration::from_millis(300));
    assert!(!done, "nothing is frozen");
    frozen.thaw().expect("thawed by us");
    writer.join().expect("the writer went on");
    drop(freeze(&mounted.dir).expect("frozen again"));
    let (done, _) = writes_within(&mounted.dir, Duration::from_secs(5));
    assert!(done, "dropping it thaws it");
}

#[test]
fn it_is_thawed_when_who_froze_it_is_killed() {
    // The victim is this test program again, which freezes and waits.
    if let Some(dir) = std::env::var_os("FORKDISK_TEST_FREEZE") {
        let _frozen = freeze(Path::new(&dir)).expect("frozen");
        println!("frozen");
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    let me = std::env::current_exe().expect("this program");
    let mut victim = Command::new(me)
        .args(["--exact", "it_is_thawed_when_who_froze_it_is_killed"])
        .env("FORKDISK_TEST_FREEZE", &mounted.dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("it runs");
    // Frozen as soon as a write does not come back.
    let deadline = Instant::now() + Duration::from_secs(20);
    let writer = loop {
        assert!(Instant::now() < deadline, "never frozen");
        let (done, writer) = writes_within(&mounted.dir, Duration::from_millis(200));
        if !done {
            break writer;
        }
    };
    let killed = Instant::now();
    victim.kill().expect("killed");
    victim.wait().expect("gone");
    writer.join().expect("the writer went on");
    assert!(
        killed.elapsed() < Duration::from_secs(5),
        "only the time limit thawed it"
    );
}

/// Stopped while the freeze goes on, it cannot say when it is done.
#[test]
fn it_is_thawed_when_who_froze_it_is_stopped() {
    if let Some(dir) = std::env::var_os("FORKDISK_TEST_FREEZE") {
        let _frozen = freeze(Path::new(&dir)).expect("frozen");
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let Some(mounted) = Mounted::new() else {
        return;
    };
    // The freeze has to write all of this, and a signal that comes meanwhile is taken when it is done.
    std::fs::write(mounted.dir.join("much"), vec![7; 20 << 20]).expect("written");
    let me = std::env::current_exe().expect("this program");
    let mut victim = Command::new(me)
        .args(["--exact", "it_is_thawed_when_who_froze_it_is_stopped"])
        .env("FORKDISK_TEST_FREEZE", &mounted.dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("it runs");
    let pid = rustix::process::Pid::from_child(&victim);
    // In the middle of FIFREEZE, as the kernel tells of a call that waits.
    let tasks = format!("/proc/{}/task", victim.id());
    let freezes = || {
        let tasks = std::fs::read_dir(&tasks).into_iter().flatten().flatten();
        tasks
            .filter_map(|task| std::fs::read_to_string(task.path().join("syscall")).ok())
            .any(|call| call.contains(" 0xc0045877 "))
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    while !freezes() {
        assert!(Instant::now() < deadline, "no freeze was seen");
    }
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("stopped");
    // A write that comes early may still pass.
    let writer = (0..20)
        .map(|_| writes_within(&mounted.dir, Duration::from_millis(200)))
        .find_map(|(done, writer)| (!done).then_some(writer))
        .expect("nothing was frozen");
    let stopped = Instant::now();
    while !writer.is_finished() && stopped.elapsed() < Duration::from_secs(15) {
        std::thread::sleep(Duration::from_millis(10));
    }
    let went_on = writer.is_finished();
    victim.kill().expect("killed");
    victim.wait().expect("gone");
    writer.join().expect("the writer went on");
    assert!(went_on, "only the death of who froze it thawed it");
}

#[test]
fn asking_whether_a_mount_is_idle_never_unmounts_it() {
    let Some(mounted) = Mounted::new() else {
        return;
    };
    for _ in 0..3 {
        assert!(is_idle(&mounted.dir).expect("asked"));
    }
    let file = std::fs::File::open(&mounted.dir).expect("open");
    assert!(!is_idle(&mounted.dir).expect("asked"));
    drop(file);
    // A command that is just being started beside this test may still hold the descriptor.
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_idle(&mounted.dir).expect("asked") {
        assert!(Instant::now() < deadline, "it stays busy");
        std::thread::sleep(Duration::from_millis(20));
    }
}
