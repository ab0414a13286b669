//! What was written, as a layer counts it: for people, and right.

use super::*;

fn life(store: &Store, name: &str) -> (u64, u64) {
    let object = store.resolve(name).expect("there");
    let life = store.life_written(&object).expect("readable");
    let life = life.expect("a layer");
    (life.by_user, life.to_host)
}

#[test]
fn what_is_written_to_the_file_is_counted_and_kept() {
    let sim = SimDisk::new(1);
    drop(store_with(&sim, &[1; 600 * 4096]));
    assert_eq!(life(&again(&sim, 3), "d"), (0, 0), "never opened");
    let (store, counting) = counted(&sim);
    let disk = open(&store, "d").expect("d");
    let began = disk.stats();
    let began_layer = began.layer.expect("writable");
    assert_eq!(began_layer.host_written, began.host_written);
    let before = counting.counts().bytes_written;
    let written = || counting.counts().bytes_written - before;
    for n in 0..40 {
        disk.write(&vec![n as u8 + 1; 5 * 4096], n * 3 * B)
            .expect("write");
        disk.write(&[9; 100], n * 3 * B + 50).expect("write");
        disk.flush().expect("flush");
    }
    disk.discard(0, 512 * B).expect("discard");
    assert!(disk.stats().layer.expect("writable").dirty > 0);
    disk.flush().expect("flush");
    let stats = disk.stats();
    assert_eq!(stats.layer.expect("writable").dirty, 0);
    assert!(stats.layer.expect("writable").journal > 0);
    disk.checkpoint().expect("checkpoint");
    disk.maintain().expect("maintained");
    let user = 40 * (5 * 4096 + 100);
    let stats = disk.stats();
    assert_eq!(stats.layer.expect("writable").user_written, user);
    assert_eq!(stats.layer.expect("writable").journal, 0);
    assert_eq!(stats.host_written - began.host_written, written());
    disk.close().expect("close");
    // Also what closing wrote, both copies of the last superblock included.
    assert_eq!(
        life(&store, "d"),
        (user, began_layer.host_written + written())
    );
    drop(disk);

    // It goes on where it ended; and so does the disk above a snapshot of it.
    let disk = open(&store, "d").expect("d");
    disk.write(&[1; 4096], 0).expect("write");
    let before_seal = disk.stats();
    assert_eq!(
        before_seal.layer.expect("writable").user_written,
        user + 4096
    );
    store
        .snapshot_running(&disk, "d", "s", None)
        .expect("snapshot");
    let (by_user, to_host) = life(&store, "d@s");
    assert_eq!(by_user, user + 4096);
    assert!(to_host > before_seal.layer.expect("writable").host_written);
    let after = disk.stats();
    assert_eq!(after.layer.expect("writable").user_written, user + 4096);
    assert!(
        after.host_written > before_seal.host_written,
        "what the sealed layer cost still counts"
    );
    assert_eq!(after.depth, 2);
}

#[test]
fn after_a_crash_the_count_is_that_of_the_last_superblock() {
    let sim = SimDisk::new(1);
    let store = store_with(&sim, &[1; 60 * 4096]);
    let disk = open(&store, "d").expect("d");
    disk.write(&[1; 8192], 0).expect("write");
    disk.flush().expect("flush");
    disk.checkpoint().expect("checkpoint");
    disk.write(&[2; 4096], 0).expect("write");
    disk.flush().expect("flush");
    let sim = sim.crash_with(forkdisk::io::sim::Policy::AllDone);
    drop(disk);
    let store = again(&sim, 5);
    assert_eq!(life(&store, "d").0, 8192);
    let disk = open(&store, "d").expect("d");
    disk.write(&[3; 4096], 0).expect("write");
    disk.close().expect("close");
    assert_eq!(life(&store, "d").0, 8192 + 4096);
}
