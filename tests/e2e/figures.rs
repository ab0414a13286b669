//! Figures that are promised: space and time of forks, space of writes.

use crate::rig::*;
use std::{
    fs::File,
    os::unix::fs::{FileExt, OpenOptionsExt},
    time::Instant,
};

#[test]
fn ten_thousand_forks() {
    if !root() {
        return;
    }
    let w = World::new();
    // 4 GiB, with something in it.
    let image = w.sparse("base.img", 4 << 30);
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .write_all_at(&noise(1, 1 << 20), 1 << 30)
        .unwrap();
    w.ok(["import", s(&image)]);
    let used = || {
        tool("sync", ["-f", s(&w.dir)]);
        du(&w.store.join("layers")) + du(&w.store.join("names"))
    };
    let before = used();
    let started = Instant::now();
    w.ok(["create", "web", "--from", "base", "--count", "10000"]);
    let took = started.elapsed();
    let each = (used() - before) / 10_000;
    println!("10,000 forks in {took:?}, {each} bytes each");
    assert!(took.as_secs_f64() < 10.0, "{took:?}");
    assert!(each <= 16 << 10, "{each} bytes each");
    // One more costs what the first did, and the last works.
    let started = Instant::now();
    w.ok(["create", "one", "--from", "web-10000"]);
    assert!(started.elapsed().as_secs() < 5);
    let device = w.ok(["attach", "web-10000"]);
    assert!(read_direct(device.as_ref(), 1 << 30, 1 << 20) == noise(1, 1 << 20));
    w.ok(["detach", "web-10000"]);
    assert_eq!(w.names().len(), 10_002);
    w.finish();
}

#[test]
fn ten_thousand_random_writes() {
    if !root() {
        return;
    }
    let w = World::new();
    let image = w.sparse("base.img", 4 << 30);
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .write_all_at(&noise(1, 64 << 20), 1 << 20)
        .unwrap();
    w.ok(["import", s(&image)]);
    w.ok(["create", "d", "--from", "base"]);
    let used = || {
        tool("sync", ["-f", s(&w.dir)]);
        w.stored()
    };
    let before = used();
    let device = w.ok(["attach", "d"]);
    let open = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(&device)
        .unwrap();
    let mut place = 12345u64;
    let mut seen = std::collections::HashSet::new();
    // As aligned as direct I/O wants it.
    let mut buffer = vec![0u8; 8192];
    let offset = buffer.as_ptr().align_offset(4096);
    while seen.len() < 10_000 {
        place = place
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let block = (place >> 33) % (1 << 20);
        if seen.insert(block) {
            buffer[offset..offset + 4096].copy_from_slice(&noise(block, 4096));
            open.write_all_at(&buffer[offset..offset + 4096], block * 4096)
                .unwrap();
        }
    }
    open.sync_all().unwrap();
    drop(open);
    w.ok(["detach", "d"]);
    let grown = used() - before;
    println!("10,000 random writes of 4 KiB take {grown} bytes");
    assert!(grown <= 42 << 20, "{grown}");
    let device = w.ok(["attach", "d"]);
    for block in seen.iter().take(500) {
        assert!(
            read_direct(device.as_ref(), block * 4096, 4096) == noise(*block, 4096),
            "block {block}"
        );
    }
    w.ok(["detach", "d"]);
    w.finish();
}
