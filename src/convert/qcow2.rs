//! A disk as a qcow2 image (version 3, clusters of 64 KiB, no backing file), as QEMU and others read it: a file, or a stream. Images of others are read by [`image`].
//!
//! Always true:
//! - the target appears under its name whole, synced, or not at all ([`raw`](super::raw));
//! - all that describes the image stands before its data, and what a cluster's place is follows from the block maps alone: so it can be written to a pipe;
//! - a cluster of which nothing is known but zeros has no place. In a file, one that turns out to be zeros leaves a hole where it would be.
//!
//! The format: "QCOW2 Image Format Specification", `docs/interop/qcow2.rst` of QEMU.

pub mod image;

use super::raw::{NewFile, WINDOW, check_target, is_zero, to_pipe};
use crate::{
    disk::{Disk, stretches},
    error::{Error, Kind, Result},
    store::Progress,
};
use std::{
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
};
use zerocopy::{
    FromBytes, FromZeros, Immutable, IntoBytes,
    big_endian::{U32, U64},
};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Clusters that one L2 table describes.
const TABLE: u64 = CLUSTER / 8;
/// Clusters that one block of reference counts describes: they have 16 bits.
const COUNTS: u64 = CLUSTER / 2;
/// In an entry of a table: what it refers to has one reference.
const COPIED: u64 = 1 << 63;
/// Clusters read and written at once.
const PIECE: u64 = 16;

#[derive(IntoBytes, FromBytes, Immutable)]
#[repr(C)]
struct Header {
    magic: U32,
    version: U32,
    backing_file_offset: U64,
    backing_file_size: U32,
    cluster_bits: U32,
    size: U64,
    crypt_method: U32,
    l1_size: U32,
    l1_table_offset: U64,
    refcount_table_offset: U64,
    refcount_table_clusters: U32,
    nb_snapshots: U32,
    snapshots_offset: U64,
    incompatible_features: U64,
    compatible_features: U64,
    autoclear_features: U64,
    refcount_order: U32,
    header_length: U32,
}

/// Where everything goes: header, table of reference counts, their blocks, L1 table, L2 tables, data, each from a cluster on.
struct Plan {
    /// Bytes of the virtual disk, in whole sectors.
    size: u64,
    /// The clusters of the disk that have a place, in order.
    data: Vec<Range<u64>>,
    /// How many these are.
    clusters: u64,
    /// The entries of the L1 table that have an L2 table, in order.
    tables: Vec<u64>,
    table_of_counts: u64,
    blocks_of_counts: u64,
    l1_clusters: u64,
}

impl Plan {
    fn of(disk: &dyn Disk, len: u64, progress: &dyn Progress) -> Result<Plan> {
        let mut data: Vec<Range<u64>> = Vec::new();
        let mut window = 0;
        while window < len {
            let size = WINDOW.min(disk.size() - window);
            goes_on(progress, 0, len)?;
            for stretch in stretches(&disk.extents(window, size)?) {
                let (from, to) = (stretch.start, stretch.end.min(len));
                if from >= to {
                    continue;
                }
                let (from, to) = (from / CLUSTER, to.div_ceil(CLUSTER));
                match data.last_mut() {
                    Some(last) if from <= last.end => last.end = to.max(last.end),
                    _ => data.push(from..to),
                }
            }
            window += size;
        }
        let clusters = data.iter().map(|r| r.end - r.start).sum();
        let mut tables: Vec<u64> = Vec::new();
        for range in &data {
            let next = tables.last().map_or(0, |last| last + 1);
            tables.extend((range.start / TABLE).max(next)..=(range.end - 1) / TABLE);
        }
        let size = len.next_multiple_of(512);
        let mut plan = Plan {
            size,
            l1_clusters: (size.div_ceil(CLUSTER * TABLE) * 8)
                .div_ceil(CLUSTER)
                .max(1),
            data,
            clusters,
            tables,
            table_of_counts: 1,
            blocks_of_counts: 1,
        };
        // The counts are counted too.
        loop {
            let blocks = plan.end().div_ceil(COUNTS);
            let table = (blocks * 8).div_ceil(CLUSTER);
            if (blocks, table) == (plan.blocks_of_counts, plan.table_of_counts) {
                return Ok(plan);
            }
            (plan.blocks_of_counts, plan.table_of_counts) = (blocks, table);
        }
    }
    fn l1(&self) -> u64 {
        1 + self.table_of_counts + self.blocks_of_counts
    }
    fn l2(&self) -> u64 {
        self.l1() + self.l1_clusters
    }
    fn first(&self) -> u64 {
        self.l2() + self.tables.len() as u64
    }
    fn end(&self) -> u64 {
        self.first() + self.clusters
    }
    /// Gives `put` all that stands before the data, in order, in whole clusters. `absent`: data clusters that have no place after all, by their number
    /// among those of the plan, in order.
    fn describe(
        &self,
        absent: &[Range<u64>],
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut cluster = vec![0u8; CLUSTER as usize];
        let header = Header {
            magic: U32::new(0x5146_49fb),
            version: U32::new(3),
            cluster_bits: U32::new(CLUSTER_BITS),
            size: U64::new(self.size),
            l1_size: U32::new(self.size.div_ceil(CLUSTER * TABLE) as u32),
            l1_table_offset: U64::new(self.l1() * CLUSTER),
            refcount_table_offset: U64::new(CLUSTER),
            refcount_table_clusters: U32::new(self.table_of_counts as u32),
            refcount_order: U32::new(4),
            header_length: U32::new(size_of::<Header>() as u32),
            ..Header::new_zeroed()
        };
        // No extension follows: the zeros behind say so.
        cluster[..size_of::<Header>()].copy_from_slice(header.as_bytes());
        put(&cluster)?;
        let first_block = 1 + self.table_of_counts;
        let blocks = (0..self.blocks_of_counts).map(|i| (first_block + i) * CLUSTER);
        put_entries(blocks, self.table_of_counts, put)?;
        self.counts(absent, put)?;
        let mut tables = self.tables.iter().zip(self.l2()..).peekable();
        let entries = (0..self.size.div_ceil(CLUSTER * TABLE)).map(|i| {
            let found = tables.next_if(|(table, _)| **table == i);
            found.map_or(0, |(_, at)| (at * CLUSTER) | COPIED)
        });
        put_entries(entries, self.l1_clusters, put)?;
        // One table after the other, and in each one entry after the other.
        let mut ranges = self.data.iter().cloned().peekable();
        let (mut number, mut absent) = (0, absent.iter().peekable());
        for table in &self.tables {
            let clusters = table * TABLE..(table + 1) * TABLE;
            let mut entry = |cluster: u64| {
                while ranges.next_if(|r| r.end <= cluster).is_some() {}
                if ranges.peek().is_none_or(|r| cluster < r.start) {
                    return 0;
                }
                let here = ((self.first() + number) * CLUSTER) | COPIED;
                let gone = within(&mut absent, number);
                number += 1;
                if gone { 0 } else { here }
            };
            let mut all = Vec::with_capacity(TABLE as usize);
            all.extend(clusters.map(&mut entry));
            put_entries(all.into_iter(), 1, put)?;
        }
        Ok(())
    }
    /// The blocks of reference counts: one for each cluster of the file that is in use.
    fn counts(
        &self,
        absent: &[Range<u64>],
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut absent = absent.iter().peekable();
        let mut block = vec![0u8; CLUSTER as usize];
        for start in (0..self.blocks_of_counts).map(|i| i * COUNTS) {
            for (at, count) in (start..).zip(block.chunks_exact_mut(2)) {
                let gone = at >= self.first() && within(&mut absent, at - self.first());
                let used = at < self.end() && !gone;
                count.copy_from_slice(&u16::from(used).to_be_bytes());
            }
            put(&block)?;
        }
        Ok(())
    }
    /// Gives `put` the clusters of the plan, several at a time, and the number of the first of them.
    fn copy(
        &self,
        disk: &dyn Disk,
        len: u64,
        progress: &dyn Progress,
        put: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut buf = vec![0u8; (PIECE * CLUSTER) as usize];
        let mut number = 0;
        for range in &self.data {
            let mut at = range.start;
            while at < range.end {
                let n = PIECE.min(range.end - at);
                let piece = &mut buf[..(n * CLUSTER) as usize];
                let there = (len - at * CLUSTER).min(n * CLUSTER) as usize;
                disk.read(&mut piece[..there], at * CLUSTER)?;
                piece[there..].fill(0);
                put(number, piece)?;
                (at, number) = (at + n, number + n);
                goes_on(progress, (at * CLUSTER).min(len), len)?;
            }
        }
        Ok(())
    }
}

fn goes_on(progress: &dyn Progress, done: u64, len: u64) -> Result<()> {
    match progress.update(done, len) {
        true => Ok(()),
        false => Err(Error::new(Kind::Interrupted, "interrupted")),
    }
}

/// Is `number` in one of the ranges? They are in order, and asked for rising numbers.
fn within<'r>(
    ranges: &mut std::iter::Peekable<impl Iterator<Item = &'r Range<u64>>>,
    number: u64,
) -> bool {
    while ranges.next_if(|r| r.end <= number).is_some() {}
    ranges.peek().is_some_and(|r| r.start <= number)
}

/// Entries of 8 bytes, and zeros up to the end of so many clusters.
fn put_entries(
    mut entries: impl Iterator<Item = u64>,
    clusters: u64,
    put: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut cluster = vec![0u8; CLUSTER as usize];
    for _ in 0..clusters {
        for place in cluster.chunks_exact_mut(8) {
            place.copy_from_slice(&entries.next().unwrap_or(0).to_be_bytes());
        }
        put(&cluster)?;
    }
    Ok(())
}

/// Writes the first `len` bytes of `disk` as a qcow2 image into a new file at `target`. Replaces a file that is there only if `replace`. Returns how many
/// bytes of data were written, in whole clusters of 64 KiB, which leaves out those of zeros.
pub fn export_file(
    disk: &dyn Disk,
    len: u64,
    target: &Path,
    replace: bool,
    progress: &dyn Progress,
) -> Result<u64> {
    let target = check_target(target, replace)?;
    let plan = Plan::of(disk, len, progress)?;
    let new = NewFile::beside(&target)?;
    let failed = |e: io::Error| Error::io("write", &target, &e);
    new.file.set_len(plan.end() * CLUSTER).map_err(failed)?;
    let (mut absent, mut zeros): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
    plan.copy(disk, len, progress, &mut |number, piece| {
        for (number, cluster) in (number..).zip(piece.chunks(CLUSTER as usize)) {
            if is_zero(cluster) {
                zeros += 1;
                match absent.last_mut() {
                    Some(last) if last.end == number => last.end += 1,
                    _ => absent.push(number..number + 1),
                }
                continue;
            }
            let at = (plan.first() + number) * CLUSTER;
            new.file.write_all_at(cluster, at).map_err(failed)?;
        }
        Ok(())
    })?;
    let mut at = 0;
    plan.describe(&absent, &mut |bytes| {
        new.file.write_all_at(bytes, at).map_err(failed)?;
        at += bytes.len() as u64;
        Ok(())
    })?;
    let synced = new.file.sync_all();
    synced.map_err(|e| Error::io("sync", &target, &e))?;
    new.name(&target, replace)?;
    Ok((plan.clusters - zeros) * CLUSTER)
}

/// Writes the first `len` bytes of `disk` as a qcow2 image to `out`. The inner result tells of `out` failing, so that the caller can tell a reader that went
/// away from a disk that cannot be read.
pub fn export_stream(
    disk: &dyn Disk,
    len: u64,
    out: &mut dyn Write,
    progress: &dyn Progress,
) -> Result<io::Result<()>> {
    let plan = Plan::of(disk, len, progress)?;
    to_pipe(out, |put| {
        plan.describe(&[], put)?;
        plan.copy(disk, len, progress, &mut |_, piece| put(piece))
    })
}
