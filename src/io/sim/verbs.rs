//! [`Dir`] and [`File`] on the imaginary disk: each call checks what the kernel would check, in the same order
//! as the real disk, and then changes [`State`].

use super::{
    Harm, Machine, Verb,
    image::{Change, Image},
    state::{DirNode, FileNode, Ino, NameChange, Node, Pass, State, power_off},
};
use crate::{
    error::{Error, Result},
    io::{
        Access, Dir, EntryKind, File, Mapping,
        common::{check_name, check_range, fail, locked, past_end, read_only},
    },
    units::BLOCK,
};
use std::{path::PathBuf, sync::Arc};

type Shared = Arc<Machine>;

pub(super) struct SimDir {
    state: Shared,
    ino: Ino,
    path: PathBuf,
}

/// An open file: a holder of its own, for the lock and for the life of the inode.
struct SimFile {
    state: Shared,
    ino: Ino,
    handle: u64,
    writable: bool,
    path: PathBuf,
}

fn entry_kind(state: &State, ino: Ino) -> EntryKind {
    match state.nodes.get(&ino) {
        Some(Node::Dir(_)) => EntryKind::Dir,
        _ => EntryKind::File,
    }
}

impl SimDir {
    pub(super) fn new(state: Shared, ino: Ino, path: PathBuf) -> SimDir {
        SimDir { state, ino, path }
    }
    fn at(&self, name: &str) -> Result<PathBuf> {
        check_name(&self.path, name)?;
        Ok(self.path.join(name))
    }
    fn dir<'s>(&self, state: &'s mut State, what: &str) -> Result<&'s mut DirNode> {
        state
            .dir(self.ino)
            .ok_or_else(|| fail(what, &self.path, libc::ENOENT))
    }
    fn find(&self, state: &mut State, what: &str, name: &str) -> Result<Option<Ino>> {
        Ok(self.dir(state, what)?.now.get(name).copied())
    }
    fn existing(&self, state: &mut State, what: &str, name: &str) -> Result<Ino> {
        self.find(state, what, name)?
            .ok_or_else(|| fail(what, &self.path.join(name), libc::ENOENT))
    }
    /// The end of every change of names, once it is known to be legal.
    fn finish(&self, state: &mut State, pass: Pass, what: &str, change: NameChange) -> Result<()> {
        match pass {
            Pass::Go => {
                state.rename(self.ino, change);
                Ok(())
            }
            Pass::Fault(errno) => Err(fail(what, &self.path, errno)),
            Pass::Flight => {
                state.rename_in_flight(self.ino, change);
                Err(power_off(what, &self.path))
            }
        }
    }
    fn create(&self, state: &mut State, pass: Pass, name: &str, node: Node) -> Result<Ino> {
        if self.find(state, "create", name)?.is_some() {
            return Err(fail("create", &self.path.join(name), libc::EEXIST));
        }
        if let Pass::Fault(errno) = pass {
            return Err(fail("create", &self.path.join(name), errno));
        }
        let ino = state.new_node(node);
        let name = name.to_string();
        self.finish(state, pass, "create", NameChange::Create { name, ino })?;
        Ok(ino)
    }
    fn rename_any(&self, from: &str, to: &str, replace: bool) -> Result<()> {
        let path = self.at(from)?;
        let new = self.at(to)?;
        let told = |e: Error| e.context(format!("cannot rename {from} to {}", new.display()));
        let mut state = self.state.lock();
        let pass = state.operation(Verb::Rename, "rename", &path)?;
        let ino = self.existing(&mut state, "rename", from).map_err(told)?;
        let replaced = self.find(&mut state, "rename", to)?;
        if let Some(other) = replaced {
            let errno = match (entry_kind(&state, ino), entry_kind(&state, other)) {
                _ if !replace => Some(libc::EEXIST),
                (EntryKind::File, EntryKind::Dir) => Some(libc::EISDIR),
                (EntryKind::Dir, EntryKind::File) => Some(libc::ENOTDIR),
                (EntryKind::Dir, EntryKind::Dir)
                    if state.dir(other).is_some_and(|dir| !dir.now.is_empty()) && other != ino =>
                {
                    Some(libc::ENOTEMPTY)
                }
                _ => None,
            };
            if let Some(errno) = errno {
                return Err(told(fail("replace", &new, errno)));
            }
            if other == ino {
                return match pass {
                    Pass::Go => Ok(()),
                    Pass::Fault(errno) => Err(fail("rename", &path, errno)),
                    Pass::Flight => Err(power_off("rename", &path)),
                };
            }
        }
        let (from, to) = (from.to_string(), to.to_string());
        let change = NameChange::Rename {
            from,
            to,
            ino,
            replaced,
        };
        self.finish(&mut state, pass, "rename in", change)
    }
    fn remove_any(&self, name: &str, kind: EntryKind) -> Result<()> {
        let path = self.at(name)?;
        let mut state = self.state.lock();
        let pass = state.operation(Verb::Remove, "remove", &path)?;
        let ino = self.existing(&mut state, "remove", name)?;
        let errno = match (entry_kind(&state, ino), kind) {
            (EntryKind::Dir, EntryKind::File) => Some(libc::EISDIR),
            (EntryKind::File, EntryKind::Dir) => Some(libc::ENOTDIR),
            (EntryKind::Dir, _) if state.dir(ino).is_some_and(|dir| !dir.now.is_empty()) => {
                Some(libc::ENOTEMPTY)
            }
            _ => None,
        };
        if let Some(errno) = errno {
            return Err(fail("remove", &path, errno));
        }
        let name = name.to_string();
        let change = NameChange::Remove { name, ino };
        self.finish(&mut state, pass, "remove in", change)
    }
}

impl Dir for SimDir {
    fn open(&self, name: &str, access: Access) -> Result<Arc<dyn File>> {
        let path = self.at(name)?;
        let mut state = self.state.lock();
        let ino = match access {
            Access::CreateNew => {
                let pass = state.operation(Verb::Create, "create", &path)?;
                let node = Node::File(FileNode::new(Image::default()));
                self.create(&mut state, pass, name, node)?
            }
            Access::Read | Access::Write => {
                state.look(Verb::Open, "open", &path)?;
                let ino = self.existing(&mut state, "open", name)?;
                if entry_kind(&state, ino) == EntryKind::Dir {
                    return Err(fail("open", &path, libc::EISDIR));
                }
                ino
            }
        };
        let handle = state.open_handle(ino);
        Ok(Arc::new(SimFile {
            state: self.state.clone(),
            ino,
            handle,
            writable: access != Access::Read,
            path,
        }))
    }
    fn subdir(&self, name: &str) -> Result<Arc<dyn Dir>> {
        let path = self.at(name)?;
        let mut state = self.state.lock();
        state.look(Verb::Look, "open", &path)?;
        let ino = self.existing(&mut state, "open", name)?;
        match entry_kind(&state, ino) {
            EntryKind::Dir => Ok(Arc::new(SimDir::new(self.state.clone(), ino, path))),
            _ => Err(fail("open", &path, libc::ENOTDIR)),
        }
    }
    fn create_dir(&self, name: &str) -> Result<()> {
        let path = self.at(name)?;
        let mut state = self.state.lock();
        let pass = state.operation(Verb::CreateDir, "create", &path)?;
        self.create(&mut state, pass, name, Node::Dir(DirNode::default()))?;
        Ok(())
    }
    fn list(&self) -> Result<Vec<(String, EntryKind)>> {
        let mut state = self.state.lock();
        state.look(Verb::Look, "list", &self.path)?;
        // A removed directory that is still open is an empty one.
        let names = state.dir(self.ino).map(|dir| dir.now.clone());
        let names = names.unwrap_or_default().into_iter();
        Ok(names
            .map(|(name, ino)| (name, entry_kind(&state, ino)))
            .collect())
    }
    fn entry(&self, name: &str) -> Result<Option<EntryKind>> {
        let path = self.at(name)?;
        let mut state = self.state.lock();
        state.look(Verb::Look, "look at", &path)?;
        let ino = state
            .dir(self.ino)
            .and_then(|dir| dir.now.get(name).copied());
        Ok(ino.map(|ino| entry_kind(&state, ino)))
    }
    fn rename(&self, from: &str, to: &str) -> Result<()> {
        self.rename_any(from, to, true)
    }
    fn rename_new(&self, from: &str, to: &str) -> Result<()> {
        self.rename_any(from, to, false)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.remove_any(name, EntryKind::File)
    }
    fn remove_dir(&self, name: &str) -> Result<()> {
        self.remove_any(name, EntryKind::Dir)
    }
    fn sync(&self) -> Result<()> {
        let mut state = self.state.lock();
        match state.operation(Verb::SyncDir, "sync", &self.path)? {
            Pass::Go => {
                state.sync_dir(self.ino);
                Ok(())
            }
            Pass::Fault(errno) => {
                state.fail_sync_dir(self.ino);
                Err(fail("sync", &self.path, errno))
            }
            Pass::Flight => Err(power_off("sync", &self.path)),
        }
    }
    fn sync_filesystem(&self) -> Result<()> {
        const WHAT: &str = "sync the filesystem of";
        let mut state = self.state.lock();
        let pass = state.operation(Verb::SyncFilesystem, WHAT, &self.path)?;
        let (files, dirs) = state.inodes();
        match pass {
            Pass::Go => {
                files.into_iter().for_each(|ino| state.sync_file(ino));
                dirs.into_iter().for_each(|ino| state.sync_dir(ino));
                Ok(())
            }
            Pass::Fault(errno) => {
                files.into_iter().for_each(|ino| state.fail_sync_file(ino));
                dirs.into_iter().for_each(|ino| state.fail_sync_dir(ino));
                Err(fail(WHAT, &self.path, errno))
            }
            Pass::Flight => Err(power_off(WHAT, &self.path)),
        }
    }
    fn path(&self) -> PathBuf {
        self.path.clone()
    }
}

impl SimFile {
    fn stat<R>(&self, f: impl FnOnce(&FileNode) -> R) -> Result<R> {
        let mut state = self.state.lock();
        state.look(Verb::Stat, "look at", &self.path)?;
        Ok(f(state.file(self.ino)))
    }
    fn writable(&self, what: &str) -> Result<()> {
        match self.writable {
            true => Ok(()),
            false => Err(read_only(what, &self.path)),
        }
    }
    /// The way of every change: `change` is told how many of `len` bytes from `at` it is about.
    fn change(
        &self,
        verb: Verb,
        what: &str,
        (at, len): (u64, u64),
        needs_room: bool,
        change: impl Fn(&FileNode, u64) -> Change,
    ) -> Result<()> {
        self.state.interrupt(verb);
        let mut state = self.state.lock();
        let pass = state.operation(verb, what, &self.path)?;
        state.trace_range(at, len);
        let (done, errno) = match pass {
            Pass::Go if needs_room => match state.room(self.ino, at, len) {
                room if room < len => {
                    state.harm.count(Harm::FULL);
                    (room, Some(libc::ENOSPC))
                }
                _ => (len, None),
            },
            Pass::Go => (len, None),
            // A request for blocks can fail half done; one about the inode is a step of the journal.
            Pass::Fault(errno) if needs_room => {
                let room = state.room(self.ino, at, len);
                (state.some_blocks(at, room), Some(errno))
            }
            Pass::Fault(errno) => return Err(fail(what, &self.path, errno).offset(at)),
            Pass::Flight => {
                let change = change(state.file(self.ino), len);
                state.change_in_flight(self.ino, change);
                return Err(power_off(what, &self.path).offset(at));
            }
        };
        let nothing = done == 0 && len > 0;
        if !nothing && errno != Some(libc::EOPNOTSUPP) {
            let change = change(state.file(self.ino), done);
            state.change(self.ino, change);
        }
        match errno {
            Some(errno) => Err(fail(what, &self.path, errno).offset(at + done)),
            None => Ok(()),
        }
    }
}

impl File for SimFile {
    fn read_at(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.state.interrupt(Verb::Read);
        let mut state = self.state.lock();
        let told = |e: Error| e.offset(at);
        state.look(Verb::Read, "read", &self.path).map_err(told)?;
        let len = buf.len() as u64;
        let file = state.file(self.ino);
        match check_range(&self.path, at, len) {
            Ok(end) if end <= file.now.len || len == 0 => {
                file.now.read(buf, at);
                Ok(())
            }
            _ => Err(past_end(&self.path, at, buf.len())),
        }
    }
    fn write_at(&self, buf: &[u8], at: u64) -> Result<()> {
        self.writable("write")?;
        check_range(&self.path, at, buf.len() as u64)?;
        let range = (at, buf.len() as u64);
        if buf.is_empty() {
            return Ok(());
        }
        self.change(Verb::Write, "write", range, true, |_, len| Change::Write {
            at,
            bytes: buf[..len as usize].into(),
        })
    }
    fn sync(&self) -> Result<()> {
        self.state.interrupt(Verb::Sync);
        let mut state = self.state.lock();
        match state.operation(Verb::Sync, "sync", &self.path)? {
            Pass::Go => {
                state.sync_file(self.ino);
                Ok(())
            }
            Pass::Fault(errno) => {
                state.fail_sync_file(self.ino);
                Err(fail("sync", &self.path, errno))
            }
            Pass::Flight => Err(power_off("sync", &self.path)),
        }
    }
    fn len(&self) -> Result<u64> {
        self.stat(|file| file.now.len)
    }
    fn set_len(&self, len: u64) -> Result<()> {
        self.writable("resize")?;
        check_range(&self.path, len, 0)?;
        self.change(Verb::SetLen, "resize", (len, 0), false, |file, _| {
            let from = file.now.len;
            Change::SetLen { from, len }
        })
    }
    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        const WHAT: &str = "reserve space in";
        self.writable(WHAT)?;
        check_range(&self.path, at, len)?;
        if len == 0 {
            return Ok(());
        }
        self.change(Verb::Allocate, WHAT, (at, len), true, |_, len| {
            Change::Allocate { at, len }
        })
    }
    fn punch(&self, at: u64, len: u64) -> Result<()> {
        const WHAT: &str = "punch a hole into";
        self.writable(WHAT)?;
        check_range(&self.path, at, len)?;
        if len == 0 {
            return Ok(());
        }
        self.change(Verb::Punch, WHAT, (at, len), false, |_, len| {
            Change::Punch { at, len }
        })
    }
    fn start_writeback(&self, _at: u64, _len: u64) {
        // Any un-synced change may be durable already.
    }
    fn forget_cached(&self, at: u64, len: u64) {
        let mut state = self.state.lock();
        if !state.off {
            state.file(self.ino).forget_cached(at, len);
        }
    }
    fn map(&self, at: u64, len: usize) -> Result<Mapping> {
        let mut state = self.state.lock();
        state.look(Verb::Map, "map", &self.path)?;
        let file = state.file(self.ino);
        match check_range(&self.path, at, len as u64) {
            Ok(end) if end <= file.now.len => {
                let mut bytes = vec![0; len];
                file.now.read(&mut bytes, at);
                Ok(Mapping::Copied(bytes))
            }
            _ => Err(past_end(&self.path, at, len)),
        }
    }
    fn lock(&self, exclusive: bool) -> Result<()> {
        let mut state = self.state.lock();
        state.look(Verb::Lock, "lock", &self.path)?;
        let locks = &mut state.file(self.ino).locks;
        if locks.get(&self.handle) == Some(&exclusive) {
            return Ok(());
        }
        // Linux gives the old lock up before it asks for the new one, and does not give it back.
        locks.remove(&self.handle);
        if !locks.is_empty() && (exclusive || locks.values().any(|e| *e)) {
            return Err(locked(&self.path));
        }
        locks.insert(self.handle, exclusive);
        Ok(())
    }
    fn data_ranges(&self, at: u64, len: u64) -> Result<Vec<(u64, u64)>> {
        let end = check_range(&self.path, at, len)?;
        self.stat(|file| file.now.data(at..end))
    }
    fn allocated(&self) -> Result<u64> {
        self.stat(|file| file.now.blocks() * BLOCK)
    }
    fn number(&self) -> Result<u64> {
        Ok(self.ino)
    }
    fn path(&self) -> PathBuf {
        self.path.clone()
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.state.lock().close_handle(self.ino, self.handle);
    }
}
