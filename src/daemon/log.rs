//! The daemon's log: a file in the run directory, and standard error too when it runs in the foreground.

use crate::error::{Error, Kind, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

/// A log of this size is renamed to `daemon.log.old` at the next start.
const ROTATE: u64 = 8 << 20;

#[derive(Clone)]
struct Tee {
    file: Arc<File>,
    stderr: bool,
}

impl Write for Tee {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // A full disk must not end the daemon: what cannot be logged is lost, and only that.
        let _ = (&*self.file).write_all(buf);
        if self.stderr {
            let _ = io::stderr().write_all(buf);
        }
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends what is logged from now on to `daemon.log`.
pub fn begin(run_dir: &Path, stderr: bool) -> Result<()> {
    let path = run_dir.join(super::LOG);
    if path.metadata().is_ok_and(|m| m.len() > ROTATE) {
        let _ = std::fs::rename(&path, run_dir.join("daemon.log.old"));
    }
    let file = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&path)
        .map_err(|e| Error::io("open", &path, &e))?;
    let tee = Tee {
        file: Arc::new(file),
        stderr,
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORKDISK_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_target(false)
        .with_writer(move || tee.clone())
        .try_init()
        .map_err(|e| Error::new(Kind::Io, format!("cannot begin the log: {e}")))
}
