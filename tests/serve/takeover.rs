//! The server dies under load and another goes on: nobody who uses the disk notices more than a pause.
//!
//! The test is the keeper: it holds the descriptor of `/dev/fuse`. Servers are this test program again,
//! running [`server`] alone with the descriptor as standard input.

use crate::{
    disks::FileDisk,
    rig::{Loop, MountDir, Random, eventually, mounts_lock, root, run},
};
use forkdisk::{
    attach::{self, LoopOptions},
    serve::{
        files::Files,
        fuse::{self, Init, Negotiated, Options, Session},
    },
};
use std::{
    fs::{self, File},
    io::Read,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    thread,
    time::Duration,
};

const MIB: u64 = 1 << 20;
const INO: u64 = 33;

/// The body of a server process; as a test it does nothing.
#[test]
fn server() {
    let Ok(state) = std::env::var("TAKEOVER_STATE") else {
        return;
    };
    let state = Path::new(&state);
    let fd = std::io::stdin().as_fd().try_clone_to_owned().unwrap();
    let delay = Duration::from_millis(std::env::var("TAKEOVER_DELAY").unwrap().parse().unwrap());
    let disk = FileDisk::open(&state.join("disk"), delay);
    let files = Arc::new(Files::new());
    files.add_with_ino("disk", Arc::new(disk), INO).unwrap();
    let negotiated = state.join("negotiated");
    let init = match fs::read(&negotiated) {
        Ok(text) => Init::Resumed(serde_json::from_slice::<Negotiated>(&text).unwrap()),
        Err(_) => Init::Fresh,
    };
    let session = Session::start(fd, files, init, Options::default()).unwrap();
    fs::write(
        &negotiated,
        serde_json::to_vec(&session.negotiated()).unwrap(),
    )
    .unwrap();
    fs::write(state.join("ready"), "").unwrap();
    session.wait();
}

/// The keeper's side: one mount, one server at a time.
struct Kept {
    server: Option<Child>,
    dir: MountDir,
    fd: OwnedFd,
    state: PathBuf,
    _state: tempfile::TempDir,
    delay: u64,
}

impl Kept {
    fn new(size: u64, delay: u64) -> Kept {
        let dir = MountDir::new();
        let fd = fuse::mount(dir.path()).unwrap();
        let state = tempfile::Builder::new()
            .prefix("forkdisk-takeover.")
            .tempdir_in("/dev/shm")
            .unwrap();
        File::create(state.path().join("disk"))
            .unwrap()
            .set_len(size)
            .unwrap();
        let mut kept = Kept {
            server: None,
            dir,
            fd,
            state: state.path().into(),
            _state: state,
            delay,
        };
        kept.start();
        kept
    }
    fn start(&mut self) {
        let ready = self.state.join("ready");
        let _ = fs::remove_file(&ready);
        let server = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "takeover::server", "--nocapture"])
            .env("TAKEOVER_STATE", &self.state)
            .env("TAKEOVER_DELAY", self.delay.to_string())
            .stdin(Stdio::from(self.fd.try_clone().unwrap()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        self.server = Some(server);
        eventually("the server is ready", || ready.exists());
    }
    fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        server.kill().unwrap();
        server.wait().unwrap();
    }
    fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = server.kill();
            // Not waited for before the mount is gone: see below.
            let _ = fuse::mount::abort(self.dir.path());
            let _ = server.wait();
        }
    }
}

/// Fails what waits for the mount if the test does: threads that wait would keep it from ending.
struct AbortOnPanic<'a>(&'a Path, &'a AtomicBool);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.1.store(true, SeqCst);
            let _ = fuse::mount::abort(self.0);
        }
    }
}

/// A writer per stretch, each checking that what it wrote last is what it reads next.
fn pound(file: &File, index: u64, stop: &AtomicBool, done: &AtomicU64) {
    const STRETCH: u64 = MIB;
    let mut random = Random::new("takeover");
    let mut model = vec![0u8; STRETCH as usize];
    let mut buf = vec![0u8; 300_000];
    let base = index * STRETCH;
    while !stop.load(SeqCst) {
        let max = if random.below(4) == 0 { 300_000 } else { 9000 };
        let len = 1 + random.below(max);
        let at = random.below(STRETCH - len);
        let range = at as usize..(at + len) as usize;
        let buf = &mut buf[..len as usize];
        if random.below(2) == 0 {
            random.fill(buf);
            file.write_all_at(buf, base + at).unwrap();
            model[range].copy_from_slice(buf);
        } else {
            file.read_exact_at(buf, base + at).unwrap();
            assert!(buf == &model[range], "writer {index}: {len} bytes at {at}");
        }
        if random.below(50) == 0 {
            file.sync_data().unwrap();
        }
        done.fetch_add(1, SeqCst);
    }
    file.read_exact_at(&mut model.clone(), base).unwrap();
    let mut now = vec![0; STRETCH as usize];
    file.read_exact_at(&mut now, base).unwrap();
    assert!(now == model, "writer {index}");
}

#[test]
fn killed_under_load_nobody_sees_an_error() {
    if !root() {
        return;
    }
    let mut kept = Kept::new(24 * MIB, 2);
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|s| {
        let file = File::options()
            .read(true)
            .write(true)
            .open(kept.path())
            .unwrap();
        let (stop, done) = (&stop, &done);
        let file = Arc::new(file);
        let mount_dir = kept.dir.path().to_path_buf();
        let _guard = AbortOnPanic(&mount_dir, stop);
        for index in 0..24 {
            let file = Arc::clone(&file);
            s.spawn(move || pound(&file, index, stop, done));
        }
        for round in 0..8 {
            let before = done.load(SeqCst);
            eventually("work goes on", || done.load(SeqCst) > before + 200);
            kept.kill();
            // New requests pile up on top of those that died with the server.
            thread::sleep(Duration::from_millis(30 * round));
            kept.start();
        }
        let before = done.load(SeqCst);
        eventually("work goes on", || done.load(SeqCst) > before + 200);
        stop.store(true, SeqCst);
    });
    println!("{} requests over 8 deaths", done.load(SeqCst));
}

#[test]
fn a_mounted_filesystem_survives_its_servers() {
    if !root() {
        return;
    }
    let _lock = mounts_lock(false);
    let mut kept = Kept::new(256 * MIB, 0);
    let dev = Loop(attach::attach_loop(&kept.path(), LoopOptions::default()).unwrap());
    run("mkfs.ext4", &["-q", "-F", dev.path()]);
    let at = tempfile::tempdir().unwrap();
    attach::mount(dev.device(), at.path(), &attach::MountOptions::default()).unwrap();
    let mut writer = Command::new("fio")
        .args([
            "--name=v",
            "--rw=randwrite",
            "--bs=4k-64k",
            "--size=48M",
            "--verify=crc32c",
            "--verify_state_save=0",
            "--do_verify=1",
        ])
        .args([
            "--ioengine=libaio",
            "--direct=1",
            "--iodepth=16",
            "--fsync=64",
            "--loops=4",
            "--output-format=terse",
        ])
        .arg(format!("--directory={}", at.path().display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut deaths = 0;
    while writer.try_wait().unwrap().is_none() && deaths < 12 {
        thread::sleep(Duration::from_millis(150));
        kept.kill();
        // The state of devices can be asked for while nobody serves.
        let asked = Command::new("timeout")
            .args(["2", "losetup", dev.path()])
            .output()
            .unwrap();
        assert!(asked.status.success(), "{asked:?}");
        kept.start();
        deaths += 1;
    }
    let status = writer.wait().unwrap();
    let mut said = String::new();
    writer
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(status.success(), "{said}");
    println!("{deaths} deaths");
    assert!(deaths >= 2);
    attach::unmount(at.path()).unwrap();
    run("e2fsck", &["-fn", dev.path()]);
}
