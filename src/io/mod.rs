//! The seam between the store and the disk under it: names and bytes, in two small traits.
//!
//! Everything the store keeps is reached through [`Dir`] and [`File`], so that the simulated disk
//! ([`sim`]) replaces the whole world below: it owns contents *and* names, because crash bugs live
//! between a rename and the directory's sync. The real disk is [`os`].
//!
//! What the callers rely on, and all they rely on:
//!
//! - Un-synced changes of contents, lengths and allocation may after a crash be there, not be there,
//!   or be there for some 512-byte sectors; a sector of a 4 KiB page that an un-synced write touched may hold garbage.
//!   Pages that no un-synced write touched keep what they held.
//! - [`File::sync`] makes all earlier changes of that file's contents and length durable, if it returns
//!   `Ok`. After an error nothing is known of the changes since the last good sync: reads may show what is not on the disk, until
//!   a good sync and [`File::forget_cached`].
//! - A name that was created, renamed or removed is durable after [`Dir::sync`] of its directory, if those above are.
//!   A rename is atomic: after a crash the name means the old file or the new one.
//! - [`Dir::sync_filesystem`] makes everything before it durable.

mod common;
pub mod count;
pub mod os;
pub mod sim;

use crate::error::Result;
use std::{ops::Deref, sync::Arc};

/// How to open a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Reads only.
    Read,
    /// Reads and writes; the file must exist.
    Write,
    /// Creates the file, empty; the name must not exist.
    CreateNew,
}

/// What a directory entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// Anything else (a symlink, a device): never followed, never opened.
    Other,
}

/// A directory of the store. Names are single path components; none is ever followed out of the directory.
pub trait Dir: Send + Sync {
    /// Opens a file of this directory.
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>>;
    /// Opens a subdirectory.
    fn subdir(&self, name: &str) -> Result<Arc<dyn Dir>>;
    /// Creates a subdirectory; [`Kind::Exists`](crate::error::Kind::Exists) if the name is taken.
    fn create_dir(&self, name: &str) -> Result<()>;
    /// Names and kinds of all entries, in no order.
    fn list(&self) -> Result<Vec<(String, EntryKind)>>;
    /// Kind of one entry, `None` if there is none.
    fn entry(&self, name: &str) -> Result<Option<EntryKind>>;
    /// Renames within this directory, atomically replacing `to`.
    fn rename(&self, from: &str, to: &str) -> Result<()>;
    /// Renames within this directory; fails with `Exists` if `to` exists, atomically.
    fn rename_new(&self, from: &str, to: &str) -> Result<()>;
    /// Removes a file.
    fn remove(&self, name: &str) -> Result<()>;
    /// Removes an empty subdirectory.
    fn remove_dir(&self, name: &str) -> Result<()>;
    /// Makes the names of this directory durable.
    fn sync(&self) -> Result<()>;
    /// Makes everything on the filesystem of this directory durable, in one call.
    fn sync_filesystem(&self) -> Result<()>;
    /// Where this is, for messages.
    fn path(&self) -> std::path::PathBuf;
}

/// A file of the store. Offsets and lengths in bytes.
pub trait File: Send + Sync {
    /// Fills `buf` from `at`; the file's end (or beyond) is an error of kind `Corrupt`.
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()>;
    /// Writes all of `buf` at `at`, extending the file where needed.
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()>;
    /// [`File::write_at`] of what nobody is expected to read soon: it goes to the disk at once, and memory need not keep it afterwards.
    fn write_through(&self, buf: &[u8], at: u64) -> Result<()> {
        self.write_at(buf, at)
    }
    /// Makes contents and length durable (`fdatasync`).
    fn sync(&self) -> Result<()>;
    /// Length in bytes.
    fn len(&self) -> Result<u64>;
    /// Is the file empty?
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Sets the length; what is added reads as zeros.
    fn set_len(&self, len: u64) -> Result<()>;
    /// Reserves host space for a range without changing contents or length; a filesystem that cannot do
    /// it answers `Unsupported`.
    fn allocate(&self, at: u64, len: u64) -> Result<()>;
    /// Gives the range back to the host; it reads as zeros. A filesystem that cannot do it answers `Unsupported`.
    fn punch(&self, at: u64, len: u64) -> Result<()>;
    /// Copies `len` bytes of `source`, from its offset `from` on, to `at`. Where the filesystem can do that, the two share host blocks from then
    /// on, and no byte is moved.
    fn copy_from(&self, source: &dyn File, from: u64, at: u64, len: u64) -> Result<()> {
        common::copy_by_hand(self, source, from, at, len)
    }
    /// Number of the file: one name opened twice gave the same file if, while both are open, both have the same number. 0 where that cannot be
    /// told.
    fn number(&self) -> Result<u64> {
        common::number(self)
    }
    /// Starts writing the range's dirty pages to the disk without waiting; a hint, promises nothing.
    fn start_writeback(&self, at: u64, len: u64);
    /// Begins to read the range into memory without waiting; a hint.
    fn prefetch(&self, _at: u64, _len: u64) {}
    /// Is the byte at `at` in memory, as far as that can be known? A hint.
    fn is_cached(&self, _at: u64) -> bool {
        true
    }
    /// Waits until what of the range is on its way to the disk has arrived, for about a second at most. Unlike other ways to wait for it this
    /// takes no error away from the next [`File::sync`]. A hint.
    fn await_writeback(&self, _at: u64, _len: u64) {}
    /// Drops what memory holds of a range, where it is not dirty, so that later reads see what the disk holds: after a failed sync the
    /// two may differ. A hint, but one that the host follows for files that nobody else has open.
    fn forget_cached(&self, at: u64, len: u64);
    /// The file, still empty, will be rewritten in place, and what is reserved in it must stay so: a copy-on-write host filesystem
    /// would take new space for each rewriting, and have none when it is full. A hint.
    fn keep_in_place(&self) {}
    /// Maps a range of the file for reading. Only for ranges that are immutable while mapped, of
    /// files that are locked; must lie within the file.
    fn map(&self, at: u64, len: usize) -> Result<Mapping>;
    /// Takes the file's lock without waiting: exclusive or shared. Held until the last handle from the same
    /// `open` goes. `Busy` if another holds it; a failed change from one to the other loses the lock.
    fn lock(&self, exclusive: bool) -> Result<()>;
    /// The ranges `(at, len)` within `at..at+len` that hold data on the host; what is between them reads as zeros.
    /// May report holes as data.
    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>>;
    /// The ranges `(at, len)` within `at..at+len` that were ever written, as far as the filesystem tells: other than [`File::data_ranges`], which
    /// may call data what was only reserved and then read, always the same. For counts, not for contents.
    fn written_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        self.data_ranges(at, len)
    }
    /// Bytes the host has allocated for this file.
    fn allocated(&self) -> Result<u64>;
    /// Bytes that are free on the filesystem of the file, and all that it has, where that can be told.
    fn host_room(&self) -> Option<(u64, u64)> {
        None
    }
    /// Where this is, for messages.
    fn path(&self) -> std::path::PathBuf;
    /// The operating system's descriptor where there is one (never for the simulated disk).
    fn fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        None
    }
}

/// An immutable view of a range of a file.
pub enum Mapping {
    /// Pages of the file itself.
    Mapped(memmap2::Mmap),
    /// A copy, where mapping is impossible.
    Copied(Vec<u8>),
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Mapping::Mapped(map) => map,
            Mapping::Copied(bytes) => bytes,
        }
    }
}
