//! A mount with its session, loop devices and mounts over it, all gone at the end of a test, however
//! it ends.

use forkdisk::{
    attach::{self, DetachOptions, LoopAttachment, LoopOptions},
    disk::Disk,
    serve::{
        files::Files,
        fuse::{self, Init, Options, Session},
    },
    sys::mounts,
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

/// Is this root? If not, says that the test is left out.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("left out: needs root");
    }
    root
}

/// A pseudo-random sequence with a printed seed: a failing run can be repeated.
pub struct Random(u64);

impl Random {
    pub fn new(test: &str) -> Random {
        let seed = match std::env::var("SEED") {
            Ok(seed) => seed.parse().unwrap(),
            Err(_) => {
                std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64
                    ^ u64::from(std::process::id())
            }
        };
        println!("repeat with: SEED={seed} cargo test --test serve {test}");
        Random(seed | 1)
    }
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn fill(&mut self, buf: &mut [u8]) {
        for chunk in buf.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}

/// A mounted directory. Dropped: whatever still uses it fails.
pub struct MountDir(pub tempfile::TempDir);

impl MountDir {
    pub fn new() -> MountDir {
        MountDir(
            tempfile::Builder::new()
                .prefix("forkdisk-serve.")
                .tempdir()
                .unwrap(),
        )
    }
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for MountDir {
    fn drop(&mut self) {
        let _ = fuse::mount::abort(self.path());
    }
}

/// A mount and the session that serves it.
pub struct Rig {
    /// First to go: what still waits for the session then fails.
    pub dir: MountDir,
    pub files: Arc<Files>,
    pub session: Session,
}

impl Rig {
    pub fn new() -> Rig {
        Rig::with(Options::default())
    }
    pub fn with(options: Options) -> Rig {
        let dir = MountDir::new();
        let fd = fuse::mount(dir.path()).unwrap();
        let files = Arc::new(Files::new());
        let session = Session::start(fd, Arc::clone(&files), Init::Fresh, options).unwrap();
        Rig {
            dir,
            files,
            session,
        }
    }
    /// Serves a disk and returns its number and path.
    pub fn serve(&self, name: &str, disk: Arc<dyn Disk>) -> (u64, PathBuf) {
        (
            self.files.add(name, disk).unwrap(),
            self.dir.path().join(name),
        )
    }
    pub fn open(&self, name: &str) -> File {
        File::options()
            .read(true)
            .write(true)
            .open(self.dir.path().join(name))
            .unwrap()
    }
    /// Serves a disk, attaches it and returns the device.
    pub fn attach(&self, name: &str, disk: Arc<dyn Disk>, options: LoopOptions) -> Loop {
        let (_, path) = self.serve(name, disk);
        Loop(attach::attach_loop(&path, options).unwrap())
    }
}

/// A loop device. Dropped: unmounted and detached.
pub struct Loop(pub LoopAttachment);

impl Loop {
    pub fn device(&self) -> &Path {
        &self.0.device
    }
    pub fn path(&self) -> &str {
        self.0.device.to_str().unwrap()
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        for dir in attach::mounts_of(self.device()).unwrap_or_default() {
            let _ = mounts::unmount_lazily(&dir);
        }
        let options = DetachOptions {
            timeout: Duration::from_secs(10),
            force: true,
            server: None,
        };
        if let Err(e) = attach::detach_loop(&self.0, options) {
            eprintln!("left behind: {e}");
        }
    }
}

/// Runs a program to its end; panics with what it said if it fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let (stdout, stderr) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert!(
        out.status.success(),
        "{program} {args:?}: {}\n{stdout}{stderr}",
        out.status
    );
    stdout.into_owned()
}

/// Waits until `what` holds; panics after ten seconds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("does not happen: {what}");
}

/// A new mount namespace begins as a copy, and so keeps what other tests mounted at that moment mounted.
/// Tests that mount devices hold this, shared; those that make a namespace hold it alone. A file, so that
/// it works between test runs as well.
pub fn mounts_lock(alone: bool) -> File {
    let path = std::env::temp_dir().join("forkdisk-test-mounts.lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .unwrap();
    if alone {
        file.lock().unwrap()
    } else {
        file.lock_shared().unwrap()
    }
    file
}
