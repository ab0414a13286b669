//! Load with a queue: fio is told what to do, and its report is read.

use crate::{
    bench::work::Work,
    error::{Error, Kind, Result},
};
use serde_json::Value;
use std::path::Path;

/// What to put on a device.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// `randread`, `write`, ...
    pub rw: &'static str,
    /// Bytes of one request.
    pub block: u64,
    /// Requests under way at once.
    pub depth: u32,
    /// Of 100 requests, so many are reads (`randrw`).
    pub reads: u32,
    /// `fdatasync` after every write.
    pub sync: bool,
    /// Go on when every block was touched once.
    pub again: bool,
    /// The first so many bytes are used.
    pub area: u64,
    /// Stop after this long.
    pub millis: u64,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Figures {
    /// Requests that were done.
    pub ios: u64,
    /// Bytes that were read and written.
    pub bytes: u64,
    /// How long that took, in seconds.
    pub seconds: f64,
    /// 99 of 100 syncs took no longer than this, in microseconds.
    pub sync_p99: Option<f64>,
}

impl Figures {
    /// Requests a second, if `more` seconds are added to the time.
    pub fn iops(&self, more: f64) -> f64 {
        self.ios as f64 / (self.seconds + more)
    }
    /// Megabytes (10^6) a second, likewise.
    pub fn megabytes(&self, more: f64) -> f64 {
        self.bytes as f64 / 1e6 / (self.seconds + more)
    }
}

/// Fails unless there is a fio.
pub fn must_exist(work: &Work) -> Result<()> {
    match work.has("fio") {
        true => Ok(()),
        false => Err(Error::new(
            Kind::Unsupported,
            "fio is not installed, and read and write rows are measured with it",
        )
        .hint("apt-get install fio; `forkdisk bench fork` needs no fio")),
    }
}

/// Runs a load on a file or device; `direct`: past the page cache of whatever that is. Through it a request under way takes a thread, each of which reads
/// a part of its own.
pub fn run(work: &Work, target: &Path, load: &Load, direct: bool, seed: u64) -> Result<Figures> {
    let threads = match direct || load.block > 4096 {
        true => 1,
        false => load.depth,
    };
    let part = load.area / u64::from(threads);
    let mut command = work.command("fio");
    command
        .args([
            "--name=bench",
            if direct {
                "--ioengine=libaio"
            } else {
                // Asked by others it would only wait, too.
                "--ioengine=psync"
            },
            if direct { "--direct=1" } else { "--direct=0" },
            "--thread",
        ])
        .args([
            "--group_reporting",
            "--output-format=json",
            "--fallocate=none",
        ])
        // The data must not compress, and no two blocks may be alike.
        .args(["--refill_buffers", "--allow_file_create=0"])
        .arg(format!("--filename={}", target.display()))
        .arg(format!("--rw={}", load.rw))
        .arg(format!("--bs={}", load.block))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--size={part}"))
        .arg(format!("--runtime={}ms", load.millis))
        .arg(format!("--randseed={seed}"));
    if threads > 1 {
        command.arg(format!("--numjobs={threads}"));
        command.arg(format!("--offset_increment={part}"));
    }
    if load.rw == "randrw" {
        command.arg(format!("--rwmixread={}", load.reads));
    }
    if load.sync {
        command.arg("--fdatasync=1");
    }
    if load.again {
        command.args(["--time_based", "--norandommap"]);
    }
    let text = work.long(command)?;
    parse(&text).map_err(|e| e.context(format!("fio on {} told nothing", target.display())))
}

/// Reads fio's JSON, before which it may have said other things.
pub fn parse(text: &str) -> Result<Figures> {
    let bad = |what: &str| {
        Error::new(
            Kind::Io,
            format!("cannot read the report of fio: no {what}"),
        )
        .hint("`fio --version` should be 3.x")
    };
    let start = text.find('{').ok_or_else(|| bad("document"))?;
    let mut stream = serde_json::Deserializer::from_str(&text[start..]).into_iter::<Value>();
    let document = stream.next().and_then(Result::ok);
    let document = document.ok_or_else(|| bad("document"))?;
    let job = &document["jobs"][0];
    if job["error"].as_i64() != Some(0) {
        return Err(Error::new(
            Kind::Io,
            format!("fio failed with error {}", job["error"]),
        ));
    }
    let mut figures = Figures::default();
    for side in ["read", "write"] {
        let side = &job[side];
        let number = |name: &str| side[name].as_u64().ok_or_else(|| bad(name));
        figures.ios += number("total_ios")?;
        figures.bytes += number("io_bytes")?;
        // Both sides of a mixed load run at the same time.
        figures.seconds = figures.seconds.max(number("runtime")? as f64 / 1e3);
    }
    if figures.ios == 0 || figures.seconds == 0.0 {
        return Err(bad("request was done, so no time"));
    }
    let p99 = &job["sync"]["lat_ns"]["percentile"]["99.000000"];
    figures.sync_p99 = p99.as_f64().filter(|v| *v > 0.0).map(|ns| ns / 1e3);
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(error: i32, ios: u64) -> String {
        format!(
            r#"note: both iodepth >= 1 and synchronous I/O engine
            {{"fio version": "fio-3.33", "jobs": [{{"jobname": "bench", "error": {error},
              "read": {{"io_bytes": 0, "runtime": 0, "total_ios": 0}},
              "write": {{"io_bytes": 8192000, "runtime": 500, "total_ios": {ios}}},
              "sync": {{"lat_ns": {{"percentile": {{"99.000000": 250000}}}}}}}}]}}"#
        )
    }

    #[test]
    fn a_report_is_read() {
        let figures = parse(&report(0, 2000)).unwrap();
        assert_eq!(figures.iops(0.0), 4000.0);
        // What a last flush took counts.
        assert_eq!(figures.iops(0.5), 2000.0);
        assert_eq!(figures.megabytes(0.5), 8.192);
        assert_eq!(figures.sync_p99, Some(250.0));
    }

    #[test]
    fn what_is_no_report_is_an_error() {
        for text in ["", "fio: no such file", "{", "{}", r#"{"jobs": []}"#] {
            assert!(parse(text).is_err(), "{text}");
        }
        let failed = parse(&report(5, 2000)).unwrap_err().to_string();
        assert!(failed.contains("error 5"), "{failed}");
        assert!(parse(&report(0, 0)).is_err());
    }
}
