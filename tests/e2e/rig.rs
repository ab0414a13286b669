//! A store of its own, the binary that works on it, and the end of both.

use serde_json::Value;
use std::{
    ffi::OsStr,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

pub const BIN: &str = env!("CARGO_BIN_EXE_forkdisk");

/// Is this root? If not, says that the test is left out.
pub fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("left out: needs root");
    }
    root
}

/// What a command did.
#[derive(Debug)]
pub struct Out {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Out {
    fn from(out: Output) -> Out {
        Out {
            code: out.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&out.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
        }
    }
}

/// A directory with a store in it.
pub struct World {
    pub dir: PathBuf,
    pub store: PathBuf,
    _keep: tempfile::TempDir,
    /// Devices that were attached, and which use of the device it was: they are taken away at the end.
    devices: Mutex<Vec<(String, String)>>,
    /// Processes to end.
    children: Mutex<Vec<Child>>,
}

impl World {
    /// A place for a store, which the first import makes.
    pub fn new() -> World {
        World::at("store")
    }
    /// The store is at `path` below the world's directory.
    pub fn at(path: &str) -> World {
        let keep = tempfile::Builder::new()
            .prefix("forkdisk-e2e.")
            .tempdir()
            .unwrap();
        let dir = keep.path().canonicalize().unwrap();
        World {
            store: dir.join(path),
            dir,
            _keep: keep,
            devices: Mutex::default(),
            children: Mutex::default(),
        }
    }
    /// A store with one base, `base`: a new ext4 filesystem of 256 MiB.
    pub fn with_base() -> World {
        let w = World::new();
        w.import_ext4("base", 256);
        w
    }
    pub fn import_ext4(&self, name: &str, mib: u64) {
        let image = self.ext4(&format!("{name}.img"), mib);
        self.ok(["import", s(&image), name]);
    }
    /// A path in the world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
    /// A new directory.
    pub fn mkdir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }
    /// A sparse file.
    pub fn sparse(&self, name: &str, len: u64) -> PathBuf {
        let path = self.path(name);
        fs::File::create(&path).unwrap().set_len(len).unwrap();
        path
    }
    pub fn ext4(&self, name: &str, mib: u64) -> PathBuf {
        let path = self.sparse(name, mib << 20);
        tool("mkfs.ext4", ["-qF", s(&path)]);
        path
    }

    // ---- the binary --------------------------------------------------------------------------------------------

    /// The command on this store, which fails the test if it hangs.
    pub fn command<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Command {
        self.command_on(&self.store, args)
    }
    pub fn command_on<I: AsRef<OsStr>>(
        &self,
        store: &Path,
        args: impl IntoIterator<Item = I>,
    ) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["-k", "5", "100", BIN, "-S"])
            .arg(store)
            .args(args)
            .env_remove("FORKDISK_LOG")
            .env_remove("FORKDISK_STORE")
            .current_dir(&self.dir)
            .stdin(Stdio::null());
        command
    }
    pub fn run<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Out {
        finish(self.command(args))
    }
    /// Must succeed; what it printed.
    pub fn ok<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> String {
        let command = self.command(args);
        let shown = format!("{command:?}");
        let out = finish(command);
        assert_eq!(out.code, 0, "{shown}\n{out:?}\n{}", self.log());
        self.note(&out.stdout);
        out.stdout.trim_end().to_string()
    }
    /// Must succeed; its document.
    pub fn json<I: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Value {
        let mut command = self.command(["--json"]);
        command.args(args);
        let shown = format!("{command:?}");
        let out = finish(command);
        assert_eq!(out.code, 0, "{shown}\n{out:?}\n{}", self.log());
        let document: Value = serde_json::from_str(&out.stdout).expect("one document");
        assert_eq!(document["schema"], 1, "{shown}");
        if let Some(device) = document["device"].as_str() {
            self.note(device);
        }
        document
    }
    /// Must fail with `code` and a hint, as text and as JSON, and change nothing; the message and the hint.
    pub fn fails<I: AsRef<OsStr> + Copy>(&self, code: i32, args: &[I]) -> String {
        let before = self.fingerprint();
        let text = self.fails_here(code, args);
        assert!(
            before == self.fingerprint(),
            "{:?} changed the store",
            shown(args)
        );
        text
    }
    /// [`World::fails`], where what changes meanwhile is not of interest.
    pub fn fails_here<I: AsRef<OsStr> + Copy>(&self, code: i32, args: &[I]) -> String {
        let plain = self.run(args);
        let told = format!("{:?}\n{plain:?}\n{}", shown(args), self.log());
        assert_eq!(plain.code, code, "{told}");
        assert_eq!(plain.stdout, "", "{told}");
        let lines: Vec<&str> = plain
            .stderr
            .lines()
            .skip_while(|l| !l.starts_with("error: "))
            .collect();
        assert!(lines.len() >= 2, "{told}");
        assert!(lines[1].starts_with("  hint: "), "{told}");
        let mut command = self.command(["--json"]);
        command.args(args);
        let json = finish(command);
        assert_eq!(json.code, code, "{:?}\n{json:?}", shown(args));
        let line = json.stderr.lines().last().unwrap_or_default();
        let document: Value = serde_json::from_str(line).expect("a document on stderr");
        assert_eq!(document["schema"], 1);
        let field = |name: &str| {
            let text = document["error"][name].as_str().unwrap_or_default();
            assert!(!text.is_empty(), "no {name}: {line}");
            text.to_string()
        };
        let word = match code {
            2 => &["invalid"][..],
            4 => &["corrupt"],
            10 => &["no_store"],
            11 => &["busy"],
            12 => &["not_found"],
            13 => &["exists"],
            14 => &["no_space"],
            130 => &["interrupted"],
            _ => &["version", "read_only", "permission", "unsupported", "io"],
        };
        assert!(word.contains(&field("code").as_str()), "{line}");
        format!("{}\n{}", field("message"), field("hint"))
    }
    /// Remembers what `attach` printed.
    pub fn note(&self, printed: &str) {
        let device = printed.trim_end();
        if device.starts_with("/dev/loop") && !device.contains('\n') {
            self.devices
                .lock()
                .unwrap()
                .push((device.to_string(), sequence(device)));
        }
    }
    /// Ended with the world.
    pub fn child(&self, mut command: Command) -> i32 {
        let child = command.spawn().unwrap();
        let pid = child.id() as i32;
        self.children.lock().unwrap().push(child);
        pid
    }
    pub fn end_children(&self) {
        for mut child in self.children.lock().unwrap().drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    // ---- looking -----------------------------------------------------------------------------------------------

    pub fn status(&self) -> Value {
        self.json(["daemon", "status"])
    }
    pub fn pid(&self, field: &str) -> i32 {
        self.status()[field].as_i64().expect(field) as i32
    }
    pub fn log(&self) -> String {
        fs::read_to_string(self.store.join("run/daemon.log")).unwrap_or_default()
    }
    /// Everything in the store but the daemon's own: names, kinds, times of change, contents of small files.
    pub fn fingerprint(&self) -> Vec<String> {
        fn walk(dir: &Path, all: &mut Vec<String>) {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let (path, meta) = (entry.path(), entry.metadata().unwrap());
                if meta.is_dir() {
                    all.push(format!("{}/", path.display()));
                    if !path.ends_with("run") {
                        walk(&path, all);
                    }
                    continue;
                }
                let content = match meta.is_file() && meta.len() < 1 << 16 {
                    true => fs::read(&path).unwrap(),
                    false => Vec::new(),
                };
                let (len, time, links) = (meta.len(), meta.mtime_nsec(), meta.nlink());
                all.push(format!(
                    "{} {len} {time} {links} {content:?}",
                    path.display()
                ));
            }
        }
        let mut all = Vec::new();
        walk(&self.store, &mut all);
        all.sort();
        all
    }
    /// Host bytes of bases, layers and names.
    pub fn stored(&self) -> u64 {
        du(&self.store.join("layers"))
            + du(&self.store.join("names"))
            + du(&self.store.join("bases"))
    }
    pub fn layer_of(&self, name: &str) -> PathBuf {
        let id = self.json(["info", name])["id"]
            .as_str()
            .unwrap()
            .to_string();
        self.store.join(format!("layers/{id}.layer"))
    }
    /// Device of what is attached.
    pub fn device_of(&self, name: &str) -> String {
        self.json(["info", name])["device"]
            .as_str()
            .unwrap()
            .to_string()
    }
    pub fn names(&self) -> Vec<String> {
        let all = self.json(["ls"]);
        let all = all["objects"].as_array().unwrap();
        all.iter()
            .map(|o| o["name"].as_str().unwrap().to_string())
            .collect()
    }
    pub fn attached(&self) -> Vec<String> {
        let all = self.json(["ls", "attached"]);
        let all = all["attached"].as_array().unwrap();
        all.iter()
            .map(|o| o["name"].as_str().unwrap().to_string())
            .collect()
    }
    /// The store is sound, nothing is attached, and a stopped daemon leaves nothing.
    pub fn finish(&self) {
        let out = self.run(["check"]);
        assert_eq!(out.code, 0, "{out:?}\n{}", self.log());
        assert_eq!(self.attached(), [""; 0]);
        self.ok(["daemon", "stop"]);
        self.nothing_left();
    }
    pub fn nothing_left(&self) {
        let mounts = self.mounts();
        assert!(mounts.is_empty(), "{mounts:?}\n{}", self.log());
        assert_eq!(self.loops(), [""; 0], "{}", self.log());
        eventually("no process is left", || self.processes().is_empty());
    }
    /// Mount points in the world, the newest first.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let all = forkdisk::sys::mounts::list().unwrap_or_default();
        let mut all: Vec<PathBuf> = all.into_iter().map(|m| m.mount_point).collect();
        all.retain(|m| m.starts_with(&self.dir));
        all.reverse();
        all
    }
    /// Loop devices over files of the world, and those that were.
    pub fn loops(&self) -> Vec<String> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            let Ok(file) = fs::read(entry.path().join("loop/backing_file")) else {
                continue;
            };
            let ours = file.starts_with(self.dir.as_os_str().as_bytes());
            let noted = (device.clone(), sequence(&device));
            if ours || self.devices.lock().unwrap().contains(&noted) {
                found.push(device);
            }
        }
        found
    }
    /// Processes of forkdisk that work on stores of the world.
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(line) = fs::read(entry.path().join("cmdline")) else {
                continue;
            };
            let mut words = line.split(|&c| c == 0);
            let first = words.next().unwrap_or_default();
            let ours = words.any(|w| w.starts_with(self.dir.as_os_str().as_bytes()));
            if first.ends_with(b"forkdisk")
                && ours
                && let Some(Ok(pid)) = entry.file_name().to_str().map(str::parse)
            {
                found.push(pid);
            }
        }
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.end_children();
        let run = |program: &str, args: &[&str]| {
            let _ = Command::new("timeout")
                .args(["-k", "5", "20", program])
                .args(args)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status();
        };
        let (served, others): (Vec<_>, Vec<_>) = self
            .mounts()
            .into_iter()
            .partition(|m| m.ends_with("run/disks"));
        for mount in others.iter().filter(|m| !m.ends_with("host")) {
            run("umount", &["-l", s(mount)]);
        }
        for device in self.loops() {
            run("losetup", &["-d", &device]);
        }
        for pid in self.processes() {
            let _ = kill(pid, "TERM");
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.processes().is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        for pid in self.processes() {
            let _ = kill(pid, "KILL");
        }
        for mount in served
            .iter()
            .chain(others.iter().filter(|m| m.ends_with("host")))
        {
            run("umount", &["-l", s(mount)]);
        }
        for device in self.loops() {
            run("losetup", &["-d", &device]);
        }
    }
}

fn shown<I: AsRef<OsStr>>(args: &[I]) -> Vec<String> {
    args.iter()
        .map(|a| a.as_ref().to_string_lossy().into_owned())
        .collect()
}

/// Which use of a device it is: the number changes when a device gets another file.
fn sequence(device: &str) -> String {
    let name = device.trim_start_matches("/dev/");
    fs::read_to_string(format!("/sys/block/{name}/diskseq")).unwrap_or_default()
}

pub fn finish(mut command: Command) -> Out {
    let out = command
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert_ne!(out.status.code(), Some(124), "hangs: {command:?}");
    out.into()
}

pub fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a program to its end; panics with what it said if it fails.
pub fn tool<I: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = I>) -> String {
    let args: Vec<I> = args.into_iter().collect();
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut command = Command::new("timeout");
        command
            .args(["-k", "5", "100", program])
            .args(&args)
            .stdin(Stdio::null());
        let shown = format!("{command:?}");
        let out = finish(command);
        // A program that a test beside this one is starting has all descriptors of this process until
        // it is executed: a file below the mount that was open at that moment, too.
        if program == "umount" && out.stderr.contains("busy") && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        assert_eq!(out.code, 0, "{shown}\n{out:?}");
        return out.stdout;
    }
}

pub fn shell(script: &str) -> String {
    tool("bash", ["-euo", "pipefail", "-c", script])
}

/// Host bytes of a file or a directory.
pub fn du(path: &Path) -> u64 {
    let out = tool("du", ["-s", "-B1", s(path)]);
    out.split_whitespace().next().unwrap().parse().unwrap()
}

pub fn sha256(path: &Path) -> String {
    tool("sha256sum", [s(path)])[..64].to_string()
}

/// Contents and names of a tree.
pub fn tree_digest(dir: &Path) -> String {
    shell(&format!(
        "cd '{}' && (find . -type f -print0 | sort -z | xargs -0 sha256sum; find . -printf '%p %y %l\\n' | sort) | sha256sum",
        dir.display()
    ))
}

pub fn kill(pid: i32, signal: &str) -> bool {
    Command::new("kill")
        .args([&format!("-{signal}"), "--", &pid.to_string()])
        .status()
        .is_ok_and(|s| s.success())
}

/// Waits until `what` holds; panics after 20 seconds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("does not happen: {what}");
}

/// Ends a process and waits until it is gone.
pub fn kill_and_wait(pid: i32) {
    assert!(kill(pid, "KILL"));
    eventually("the process is gone", || !alive(pid));
}

/// Does the process run (and is it no zombie)?
pub fn alive(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        let state = stat.rsplit(')').next().unwrap_or_default().trim_start();
        !state.starts_with(['Z', 'X'])
    })
}

/// Bytes that look random, from a number.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Reads a range of a file or device past every cache.
pub fn read_direct(path: &Path, at: u64, len: usize) -> Vec<u8> {
    let out = Command::new("dd")
        .args([
            &format!("if={}", path.display()),
            &format!("skip={at}"),
            &format!("count={len}"),
            "iflag=direct,skip_bytes,count_bytes",
            "bs=1M",
            "status=none",
        ])
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    out.stdout
}
