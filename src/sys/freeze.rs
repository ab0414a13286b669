//! Freezing a mounted filesystem for a moment, so that a snapshot of its device is clean.
//!
//! Always true: a filesystem that [`freeze`] froze is thawed, whatever happens to this process. A
//! small child process is started *before* the freeze. It thaws if the parent dies, and also if the
//! parent has not done so [`LONGEST`] after the freeze began, which ends even a deadlock in which the
//! parent waits for the filesystem it froze.

use crate::error::{Error, Kind, Result};
use rustix::{
    fs::{Mode, OFlags},
    ioctl::{Opcode, opcode},
};
use std::{
    io::{self, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
};

/// How long a filesystem stays frozen at most, in milliseconds.
pub const LONGEST: i32 = 10_000;

const FIFREEZE: Opcode = opcode::read_write::<libc::c_int>(b'X', 119);
const FITHAW: Opcode = opcode::read_write::<libc::c_int>(b'X', 120);

/// A frozen filesystem: thawed by [`Frozen::thaw`], or when this is dropped.
pub struct Frozen {
    dir: PathBuf,
    fd: OwnedFd,
    guard: Option<Guard>,
}

/// The child that thaws if the parent cannot.
struct Guard {
    pid: libc::pid_t,
    pipe: std::fs::File,
}

fn ask(fd: RawFd, what: Opcode) -> io::Result<()> {
    // SAFETY: both requests take an argument that the kernel ignores, and touch no memory of ours.
    if unsafe { libc::ioctl(fd, what as _, 0) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Freezes the filesystem mounted at `dir`: what was written to it is on its device, and writers wait.
pub fn freeze(dir: &Path) -> Result<Frozen> {
    let fd = rustix::fs::open(
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| Error::io("open", dir, &e.into()))?;
    let mut guard = Guard::start(fd.as_raw_fd())?;
    if let Err(e) = ask(fd.as_raw_fd(), FIFREEZE) {
        guard.end();
        let failed = Error::io("freeze the filesystem at", dir, &e);
        return Err(match e.raw_os_error() {
            Some(libc::EBUSY) => failed.hint(
                "it is frozen already, by another command or by `fsfreeze`: try again when it is thawed, or leave out --freeze",
            ),
            _ => failed
                .or_hint("leave out --freeze for a snapshot that is consistent as after a crash"),
        });
    }
    let _ = guard.pipe.write_all(b"f");
    Ok(Frozen {
        dir: dir.to_path_buf(),
        fd,
        guard: Some(guard),
    })
}

impl Frozen {
    /// Lets the writers go on. An error says that the filesystem was not frozen to the end.
    pub fn thaw(mut self) -> Result<()> {
        self.release()
    }
    fn release(&mut self) -> Result<()> {
        let Some(guard) = self.guard.take() else {
            return Ok(());
        };
        let thawed = ask(self.fd.as_raw_fd(), FITHAW);
        guard.end();
        thawed.map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => Error::new(
                Kind::Busy,
                format!(
                    "the filesystem at {} was thawed before the snapshot was complete",
                    self.dir.display()
                ),
            )
            .hint("the snapshot is consistent as after a crash; take another one when the machine is less busy"),
            _ => Error::io("thaw the filesystem at", &self.dir, &e)
                .or_hint("`fsfreeze --unfreeze MOUNTPOINT` thaws it"),
        })
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = self.release();
    }
}

impl Guard {
    fn start(frozen: RawFd) -> Result<Guard> {
        let failed = |e: io::Error| Error::new(Kind::Io, format!("cannot guard the freeze: {e}"));
        let mut ends = [0; 2];
        // SAFETY: `ends` has room for the two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        // SAFETY: pipe2 succeeded: both descriptors are open and ours alone.
        let (read, write) =
            unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
        // SAFETY: the child of a process with threads may only call async-signal-safe functions until
        // it exits: `stand_guard` makes plain system calls on descriptors, allocates nothing and never
        // returns. The signal sets are plain memory, initialised by sigfillset.
        let pid = unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut old: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
            let pid = libc::fork();
            if pid == 0 {
                libc::setsid();
                libc::close(ends[1]);
                stand_guard(ends[0], frozen);
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
            pid
        };
        drop(read);
        if pid < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(Guard {
            pid,
            pipe: write.into(),
        })
    }
    /// Sends the guard home.
    fn end(mut self) {
        let _ = self.pipe.write_all(b"d");
        // SAFETY: `pid` is our child and is waited for once, here.
        unsafe {
            while libc::waitpid(self.pid, std::ptr::null_mut(), 0) < 0
                && *libc::__errno_location() == libc::EINTR
            {}
        }
    }
}

/// In the child, with all signals blocked: waits for `f` (frozen: the clock begins anew), `d` (done: go home),
/// or the end of the pipe (the parent died: thaw).
fn stand_guard(pipe: RawFd, frozen: RawFd) -> ! {
    // Before `f` too: the parent may be stopped between the freeze and its word. Not frozen yet, as the filesystem has much to write: again.
    let mut heard = false;
    let done = loop {
        let mut poll = libc::pollfd {
            fd: pipe,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut byte = 0u8;
        // SAFETY: poll gets one valid pollfd, read one byte of room.
        let got = unsafe {
            if libc::poll(&mut poll, 1, LONGEST) == 0 {
                if heard || ask(frozen, FITHAW).is_ok() {
                    break false;
                }
                continue;
            }
            libc::read(pipe, (&raw mut byte).cast(), 1)
        };
        match (got, byte) {
            (1, b'f') => heard = true,
            (1, _) => break true,
            _ => break false,
        }
    };
    if !done {
        let _ = ask(frozen, FITHAW);
    }
    // SAFETY: `_exit` is async-signal-safe and runs no destructor of the parent's.
    unsafe { libc::_exit(0) }
}
