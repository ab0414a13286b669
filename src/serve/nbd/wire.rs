//! The protocol's numbers and structures, from `proto.md` of the NBD project. All numbers are big-endian.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    byteorder::big_endian::{U16, U32, U64},
};

/// First words of a server.
pub(super) const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Begins what is said before the transmission, by both sides.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins an answer to an option.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub(super) const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Flags of the greeting: both sides have the same.
pub(super) mod greeting {
    pub const FIXED_NEWSTYLE: u16 = 1;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options: what a client may ask for before the transmission.
pub(super) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Kinds of answers to options.
pub(super) mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub const UNSUPPORTED: u32 = ERROR | 1;
    pub const INVALID: u32 = ERROR | 3;
    pub const UNKNOWN: u32 = ERROR | 6;
}

/// Kinds of information about an export.
pub(super) mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(super) mod export {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Kinds of requests.
pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub(super) mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DONT_FRAGMENT: u16 = 1 << 2;
    pub const ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;

    /// Those that a command may have. FUA is for all, where it means nothing, too.
    pub fn of(command: u16) -> u16 {
        FUA | match command {
            super::command::READ => DONT_FRAGMENT,
            super::command::WRITE_ZEROES => NO_HOLE | FAST_ZERO,
            super::command::BLOCK_STATUS => ONE,
            _ => 0,
        }
    }
}

/// Kinds of chunks, and the flag of the last one.
pub(super) mod chunk {
    pub const DONE: u16 = 1;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
}

/// States of a stretch in the context `base:allocation`.
pub(super) mod state {
    pub const HOLE: u32 = 1;
    pub const ZERO: u32 = 1 << 1;
}

/// What a client says with an option; its data follows.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct OptionHead {
    pub magic: U64,
    pub option: U32,
    pub len: U32,
}

/// What a server answers to an option; its data follows.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct OptionReply {
    pub magic: U64,
    pub option: U32,
    pub kind: U32,
    pub len: U32,
}

/// A request; the data of a WRITE follows.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Request {
    pub magic: U32,
    pub flags: U16,
    pub command: U16,
    /// What the answer is to be known by.
    pub cookie: U64,
    pub at: U64,
    pub len: U32,
}

/// An answer, which the data of a READ follows if there is no error.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Simple {
    pub magic: U32,
    pub error: U32,
    pub cookie: U64,
}

/// The beginning of a chunk.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Clone, Copy)]
#[repr(C)]
pub(super) struct Chunk {
    pub magic: U32,
    pub flags: U16,
    pub kind: U16,
    pub cookie: U64,
    pub len: U32,
}

/// Bytes of a request before its data.
pub(super) const REQUEST: usize = size_of::<Request>();
/// Bytes before the data of a READ, at most: those of a chunk and the place of the data.
pub(super) const REPLY_HEAD: usize = size_of::<Chunk>() + size_of::<U64>();

/// The error numbers of the protocol are those of Linux, but only these.
pub(super) fn error(errno: i32) -> u32 {
    let known = match errno {
        libc::EPERM | libc::EROFS | libc::EACCES => libc::EPERM,
        libc::ENOMEM
        | libc::EINVAL
        | libc::ENOSPC
        | libc::EOVERFLOW
        | libc::ENOTSUP
        | libc::ESHUTDOWN => errno,
        libc::EDQUOT => libc::ENOSPC,
        libc::ESTALE => libc::ESHUTDOWN,
        _ => libc::EIO,
    };
    known as u32
}
