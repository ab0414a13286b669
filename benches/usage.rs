//! What looking at a store of 10,000 disks takes: some hundred of them with data of their own, and 64 layers deep.
#![allow(missing_docs, reason = "a bench")]

mod common;
use common::{Rng, World, measuring, median};
use forkdisk::disk::Disk;
use forkdisk::io::Access;
use forkdisk::layer::{read_header, recover};
use forkdisk::store::Store;
use forkdisk::units::BLOCK;
use std::time::Instant;

fn write(store: &Store, name: &str, rng: &mut Rng, blocks: u64) {
    let object = store.resolve(name).expect("there");
    let disk = store.open_cow(&object, true).expect("opened");
    for _ in 0..blocks {
        let at = rng.below(disk.size() / BLOCK) * BLOCK;
        disk.write(&[7; 4096], at).expect("written");
    }
    disk.close().expect("closed");
}

fn say(what: &str, mut work: impl FnMut()) {
    let rounds = if measuring() { 7 } else { 1 };
    let mut took = Vec::new();
    for _ in 0..rounds {
        let start = Instant::now();
        work();
        took.push(start.elapsed().as_secs_f64() * 1e3);
    }
    println!("{what:<44} {:>9.1} ms", median(took));
}

fn main() {
    let (disks, written, depth, blocks) = match measuring() {
        true => (10_000, 300, 64, 512),
        false => (20, 3, 4, 8),
    };
    let world = World::new(1 << 20);
    let store = &world.store;
    let mut rng = Rng(1);
    let names: Vec<String> = (0..disks).map(|i| format!("d{i:05}")).collect();
    store
        .create(&names, "base", Some(4 << 30))
        .expect("created");
    for name in names.iter().take(written) {
        write(store, name, &mut rng, blocks);
    }
    store
        .create(&["deep".to_string()], "base", Some(4 << 30))
        .expect("created");
    for i in 0..depth {
        write(store, "deep", &mut rng, blocks);
        store
            .snapshot("deep", &format!("s{i}"), None)
            .expect("made");
    }
    let again = || Store::open(world.dir.path()).expect("a store");
    println!(
        "{disks} disks, {written} of them with {blocks} blocks of their own, and a chain of {depth} such layers"
    );
    say("du: what each refers to, and alone holds", || {
        let store = again();
        let objects = store.list().expect("listed");
        let space = store.space(objects).expect("known");
        assert!(space.objects.damaged.is_empty());
    });
    say("info of one", || {
        let store = again();
        let object = store.resolve("d00001").expect("there");
        store.details(&object).expect("known");
    });
    say("info of the deep one", || {
        let store = again();
        let object = store.resolve("deep").expect("there");
        store.details(&object).expect("known");
    });
    say("what removing one takes away", || {
        let store = again();
        store
            .plan_removal(&names[disks / 2..=disks / 2], false)
            .expect("planned");
    });
    say("ls", || drop(again().list().expect("listed")));
    say("ls layers", || drop(again().layers().expect("listed")));
    many_blocks();
}

/// Few disks with many blocks each: what is looked at for a disk must not grow with what is in it.
fn many_blocks() {
    let (disks, blocks) = match measuring() {
        true => (20, 1 << 20),
        false => (2, 1 << 10),
    };
    let world = World::new(1 << 20);
    let names: Vec<String> = (0..disks).map(|i| format!("m{i}")).collect();
    world
        .store
        .create(&names, "base", Some(blocks * BLOCK))
        .expect("created");
    for name in &names {
        let object = world.store.resolve(name).expect("there");
        let disk = world.store.open_cow(&object, true).expect("opened");
        // Each block has a pointer of its own; most are zeros, which take no room on the host.
        let mut piece = vec![0; 64 * 4096];
        piece[0] = 7;
        for at in (0..blocks).step_by(64) {
            disk.write(&piece, at * BLOCK).expect("written");
        }
        disk.close().expect("closed");
    }
    println!("{disks} disks with {blocks} pointers of their own");
    let du = |what| {
        say(what, || {
            let store = Store::open(world.dir.path()).expect("a store");
            let objects = store.list().expect("listed");
            let space = store.space(objects).expect("known");
            assert!(space.objects.damaged.is_empty());
            for (object, usage) in space.objects.sound {
                assert!(object.name == "base" || usage.refer >= blocks / 64 * BLOCK);
            }
        });
    };
    du("du: what each refers to, and alone holds");
    for name in &names {
        forget(&world.store, name);
    }
    du("the same, where nobody kept count");
}

/// What a program that does not keep count leaves.
fn forget(store: &Store, name: &str) {
    let id = store.resolve(name).expect("there").id;
    let file = store
        .layers_dir()
        .open(&format!("{id}.layer"), Access::Write)
        .expect("opened");
    let header = read_header(&*file).expect("a header");
    let found = recover::superblock(&*file, &header).expect("a superblock");
    let mut superblock = found.superblock;
    superblock.sequence += 1;
    for copy in [1, 2] {
        file.write_at(superblock.encode(), copy * BLOCK)
            .expect("written");
    }
}
