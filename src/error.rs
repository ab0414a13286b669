//! The one error type: what failed, where, why, and what the user can do about it.
//!
//! Every error has a [`Kind`], which alone decides the exit code of the command line, the `errno`
//! that a kernel front end answers, and the `code` of a JSON error. The rest is for people: the
//! sentence, the path, layer, block and offset, the cause underneath, and a hint.

use crate::units::{Id, Lba};
use std::{fmt, io, path::PathBuf};

/// The result type of the whole crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What class of failure this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Kind {
    /// The request makes no sense (bad name, bad size, bad option): usage.
    Invalid,
    /// There is no store at that path.
    NoStore,
    /// No object of that name or id.
    NotFound,
    /// The name is taken.
    Exists,
    /// Locked, attached, mounted, or needed by something else.
    Busy,
    /// The host filesystem (or a quota, or the layer's own slot space) is full.
    NoSpace,
    /// Stored data does not match its checksum or its structure.
    Corrupt,
    /// Written by a newer version of the format.
    Version,
    /// The object or the store can only be read.
    ReadOnly,
    /// The operating system denies it to this user.
    Permission,
    /// This kernel, filesystem or build cannot do it.
    Unsupported,
    /// An earlier failure poisoned the disk; it must be reopened.
    Poisoned,
    /// The user interrupted the operation.
    Interrupted,
    /// Any other failure of the operating system.
    Io,
}

impl Kind {
    /// Exit code of the command line, as documented in the manual.
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Invalid => 2,
            Kind::Corrupt => 4,
            Kind::NoStore => 10,
            Kind::Busy => 11,
            Kind::NotFound => 12,
            Kind::Exists => 13,
            Kind::NoSpace => 14,
            Kind::Interrupted => 130,
            Kind::Version
            | Kind::ReadOnly
            | Kind::Permission
            | Kind::Unsupported
            | Kind::Poisoned
            | Kind::Io => 1,
        }
    }
    /// The word that stands for this kind in JSON and on the control socket.
    pub fn code(self) -> &'static str {
        match self {
            Kind::Invalid => "invalid",
            Kind::NoStore => "no_store",
            Kind::NotFound => "not_found",
            Kind::Exists => "exists",
            Kind::Busy => "busy",
            Kind::NoSpace => "no_space",
            Kind::Corrupt => "corrupt",
            Kind::Version => "version",
            Kind::ReadOnly => "read_only",
            Kind::Permission => "permission",
            Kind::Unsupported => "unsupported",
            Kind::Poisoned => "poisoned",
            Kind::Interrupted => "interrupted",
            Kind::Io => "io",
        }
    }
    /// The kind a code stands for: the inverse of [`Kind::code`]; unknown codes are [`Kind::Io`].
    pub fn from_code(code: &str) -> Kind {
        const ALL: [Kind; 14] = [
            Kind::Invalid,
            Kind::NoStore,
            Kind::NotFound,
            Kind::Exists,
            Kind::Busy,
            Kind::NoSpace,
            Kind::Corrupt,
            Kind::Version,
            Kind::ReadOnly,
            Kind::Permission,
            Kind::Unsupported,
            Kind::Poisoned,
            Kind::Interrupted,
            Kind::Io,
        ];
        ALL.into_iter()
            .find(|k| k.code() == code)
            .unwrap_or(Kind::Io)
    }
    /// The `errno` that a kernel front end answers for this kind.
    pub fn errno(self) -> i32 {
        match self {
            Kind::Invalid => libc::EINVAL,
            Kind::NoStore | Kind::NotFound => libc::ENOENT,
            Kind::Exists => libc::EEXIST,
            Kind::Busy => libc::EBUSY,
            Kind::NoSpace => libc::ENOSPC,
            Kind::ReadOnly => libc::EROFS,
            Kind::Permission => libc::EACCES,
            Kind::Unsupported => libc::EOPNOTSUPP,
            Kind::Interrupted => libc::EINTR,
            Kind::Corrupt | Kind::Version | Kind::Poisoned | Kind::Io => libc::EIO,
        }
    }
}

/// An error of forkdisk. One pointer wide; the details are behind it.
pub struct Error(Box<Inner>);

#[derive(Clone)]
struct Inner {
    kind: Kind,
    message: String,
    path: Option<PathBuf>,
    layer: Option<Id>,
    block: Option<Lba>,
    offset: Option<u64>,
    cause: Option<String>,
    hint: Option<String>,
    resources: bool,
    quota: bool,
    waits: bool,
}

impl Error {
    /// An error of `kind`; `message` says what failed, in a sentence without a full stop.
    pub fn new(kind: Kind, message: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            layer: None,
            block: None,
            offset: None,
            cause: None,
            hint: None,
            resources: false,
            quota: false,
            waits: false,
        }))
    }
    /// An error of the operating system during `what` (an infinitive: "read", "create").
    pub fn io(what: &str, path: impl Into<PathBuf>, source: &io::Error) -> Error {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Kind::NoSpace,
            Some(libc::ENOENT | libc::ENOTDIR) => Kind::NotFound,
            Some(libc::EEXIST) => Kind::Exists,
            Some(libc::EACCES | libc::EPERM) => Kind::Permission,
            Some(libc::EROFS) => Kind::ReadOnly,
            Some(libc::EBUSY | libc::EWOULDBLOCK | libc::ETXTBSY) => Kind::Busy,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => Kind::Unsupported,
            Some(libc::EINTR) => Kind::Interrupted,
            _ => Kind::Io,
        };
        let path = path.into();
        let mut e = Error::new(kind, format!("cannot {what} {}", path.display()));
        e.0.path = Some(path);
        e.0.cause = Some(plain(source));
        let hint = match kind {
            Kind::NoSpace => Some(
                "free space on the host filesystem (`forkdisk gc`, `forkdisk rm`), then try again",
            ),
            Kind::Permission => Some("run as the owner of the store, or as root"),
            Kind::ReadOnly => Some("the host filesystem is mounted read-only"),
            _ => match source.raw_os_error() {
                Some(libc::EMFILE) => Some(
                    "no more files may be open: detach what is not needed, or raise the limit (`LimitNOFILE=` of the service, `ulimit -Hn`)",
                ),
                Some(libc::ENOMEM) => Some("free memory, or raise the limit of this process"),
                _ => None,
            },
        };
        e.0.hint = hint.map(str::to_string);
        e.0.resources = matches!(
            source.raw_os_error(),
            Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
        );
        e
    }
    /// Adds what the user can do.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Error {
        self.0.hint = Some(hint.into());
        self
    }
    /// Adds a hint unless there is one.
    #[must_use]
    pub fn or_hint(self, hint: &str) -> Error {
        if self.0.hint.is_some() {
            self
        } else {
            self.hint(hint)
        }
    }
    /// Puts a wider statement in front: what the caller was doing. The former message becomes part of the cause.
    #[must_use]
    pub fn context(mut self, doing: impl Into<String>) -> Error {
        let inner = std::mem::replace(&mut self.0.message, doing.into());
        self.0.cause = Some(match self.0.cause.take() {
            Some(cause) => format!("{inner}: {cause}"),
            None => inner,
        });
        self
    }
    /// Changes the kind.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Error {
        self.0.kind = kind;
        self
    }
    /// Adds the path of the file concerned.
    #[must_use]
    pub fn path(mut self, path: impl Into<PathBuf>) -> Error {
        self.0.path = Some(path.into());
        self
    }
    /// Adds the layer concerned.
    #[must_use]
    pub fn layer(mut self, id: Id) -> Error {
        self.0.layer = Some(id);
        self
    }
    /// Adds the block of the virtual disk concerned.
    #[must_use]
    pub fn block(mut self, lba: Lba) -> Error {
        self.0.block = Some(lba);
        self
    }
    /// Adds the byte offset in the file concerned.
    #[must_use]
    pub fn offset(mut self, at: u64) -> Error {
        self.0.offset = Some(at);
        self
    }
    /// The class of the failure.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }
    /// What the user can do; every error that reaches the command line has one.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }
    /// The layer concerned, where known.
    pub fn layer_id(&self) -> Option<Id> {
        self.0.layer
    }
    /// The block concerned, where known.
    pub fn block_lba(&self) -> Option<Lba> {
        self.0.block
    }
    /// The byte offset in the file concerned, where known.
    pub fn offset_at(&self) -> Option<u64> {
        self.0.offset
    }
    /// See [`Kind::exit_code`].
    pub fn exit_code(&self) -> u8 {
        self.0.kind.exit_code()
    }
    /// Is it about this process or this machine (open files, memory), and says nothing of what was looked at?
    pub fn of_resources(&self) -> bool {
        self.0.resources
    }
    /// Marks it: the disk has used its quota, and the host's disk has room.
    #[must_use]
    pub fn of_quota(mut self) -> Error {
        self.0.quota = true;
        self
    }
    /// Has the disk used its quota?
    pub fn is_of_quota(&self) -> bool {
        self.0.quota
    }
    /// Marks it: whoever asked should be kept waiting, and the request tried again.
    #[must_use]
    pub fn and_waits(mut self) -> Error {
        self.0.waits = true;
        self
    }
    /// Should whoever asked be kept waiting?
    pub fn waits(&self) -> bool {
        self.0.waits
    }
    /// See [`Kind::errno`].
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }
}

/// An `io::Error` without Rust's "(os error N)" tail.
fn plain(e: &io::Error) -> String {
    let text = e.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}

impl Clone for Error {
    fn clone(&self) -> Error {
        Error(self.0.clone())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        f.write_str(&e.message)?;
        if let Some(cause) = &e.cause {
            write!(f, ": {cause}")?;
        }
        let mut places = Vec::new();
        if let Some(block) = e.block {
            places.push(format!("block {block}"));
        }
        if let Some(at) = e.offset {
            places.push(format!("offset {at:#x}"));
        }
        if let Some(layer) = e.layer {
            places.push(format!("layer {layer}"));
        }
        if let Some(path) = &e.path {
            let path = path.display().to_string();
            if !e.message.contains(&path) && !e.cause.as_ref().is_some_and(|c| c.contains(&path)) {
                places.push(path);
            }
        }
        if !places.is_empty() {
            write!(f, " ({})", places.join(", "))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)?;
        if let Some(hint) = &self.0.hint {
            write!(f, " [hint: {hint}]")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}
