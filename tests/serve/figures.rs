//! What the way through FUSE and loop costs, against a loop device over a plain file in memory.
//!
//! In the environment: `THREADS` (most workers), `JOB` (only jobs whose name contains this), `SECONDS_EACH`.

use crate::{
    disks::MemDisk,
    rig::{Loop, Rig, root, run},
};
use forkdisk::{
    attach::{self, LoopOptions},
    serve::fuse::Options,
};
use std::{fs::File, sync::Arc};

const SIZE: u64 = 512 << 20;

struct Job {
    name: &'static str,
    args: &'static [&'static str],
    write: bool,
    /// MB/s instead of requests per second.
    bandwidth: bool,
}

const JOBS: [Job; 8] = [
    Job {
        name: "4k randread qd1",
        args: &["--rw=randread", "--bs=4k", "--iodepth=1"],
        write: false,
        bandwidth: false,
    },
    Job {
        name: "4k randread qd32",
        args: &["--rw=randread", "--bs=4k", "--iodepth=32"],
        write: false,
        bandwidth: false,
    },
    Job {
        name: "64k randread qd8",
        args: &["--rw=randread", "--bs=64k", "--iodepth=8"],
        write: false,
        bandwidth: true,
    },
    Job {
        name: "1M read qd1",
        args: &["--rw=read", "--bs=1M", "--iodepth=1"],
        write: false,
        bandwidth: true,
    },
    Job {
        name: "1M read qd8",
        args: &["--rw=read", "--bs=1M", "--iodepth=8"],
        write: false,
        bandwidth: true,
    },
    Job {
        name: "4k randwrite qd1",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=1"],
        write: true,
        bandwidth: false,
    },
    Job {
        name: "4k randwrite qd32",
        args: &["--rw=randwrite", "--bs=4k", "--iodepth=32"],
        write: true,
        bandwidth: false,
    },
    Job {
        name: "1M write qd8",
        args: &["--rw=write", "--bs=1M", "--iodepth=8"],
        write: true,
        bandwidth: true,
    },
];

fn measure(dev: &Loop, job: &Job, seconds: &str) -> f64 {
    let name = format!("--filename={}", dev.path());
    let runtime = format!("--runtime={seconds}");
    let mut args = vec![
        "--name=j",
        &name,
        &runtime,
        "--time_based",
        "--direct=1",
        "--ioengine=libaio",
        "--output-format=json",
        "--group_reporting",
        "--norandommap",
        "--randrepeat=0",
    ];
    args.extend(job.args);
    let out = run("fio", &args);
    let json: serde_json::Value = serde_json::from_str(&out[out.find('{').unwrap()..]).unwrap();
    let side = &json["jobs"][0][if job.write { "write" } else { "read" }];
    let key = if job.bandwidth { "bw_bytes" } else { "iops" };
    side[key].as_f64().unwrap() / if job.bandwidth { 1e6 } else { 1.0 }
}

#[test]
#[ignore = "measures for a minute"]
fn figures() {
    if !root() {
        return;
    }
    let seconds = std::env::var("SECONDS_EACH").unwrap_or_else(|_| "3".into());
    let block_size = 512;
    let mut options = Options::default();
    if let Ok(threads) = std::env::var("THREADS") {
        options.max_threads = threads.parse().unwrap();
    }
    let only = std::env::var("JOB").unwrap_or_default();
    let rig = Rig::with(options);
    let served = rig.attach(
        "disk",
        Arc::new(MemDisk::new(SIZE)),
        LoopOptions {
            block_size,
            ..Default::default()
        },
    );
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(SIZE).unwrap();
    let raw = Loop(
        attach::attach_loop(
            file.path(),
            LoopOptions {
                block_size,
                ..Default::default()
            },
        )
        .unwrap(),
    );
    for dev in [&served, &raw] {
        run(
            "fio",
            &[
                "--name=fill",
                &format!("--filename={}", dev.path()),
                "--rw=write",
                "--bs=1M",
                "--direct=1",
                "--ioengine=libaio",
                "--iodepth=4",
                "--output=/dev/null",
            ],
        );
        assert!(File::open(dev.device()).is_ok());
    }
    println!("{:20} {:>12} {:>12} {:>6}", "", "raw", "served", "ratio");
    for job in JOBS.iter().filter(|j| j.name.contains(&only)) {
        // Alternating, so that a busy machine hits both alike.
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            a.push(measure(&raw, job, &seconds));
            b.push(measure(&served, job, &seconds));
        }
        a.sort_by(f64::total_cmp);
        b.sort_by(f64::total_cmp);
        let unit = if job.bandwidth { "MB/s" } else { "IOPS" };
        println!(
            "{:20} {:>12.0} {:>12.0} {:>6.2} {unit}",
            job.name,
            a[1],
            b[1],
            b[1] / a[1]
        );
    }
    println!("threads (now, peak): {:?}", rig.session.threads());
}
