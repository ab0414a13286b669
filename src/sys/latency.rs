//! How deep idle processors may sleep: a file that is held open is a wish of its holder, and ends with it (the kernel's `Documentation/power/pm_qos_interface.rst`).

use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

/// Where the wish is told, by root.
pub const DEVICE: &str = "/dev/cpu_dma_latency";
/// Who sends idle processors to sleep.
const DRIVER: &str = "/sys/devices/system/cpu/cpuidle/current_driver";
/// The driver of a guest of KVM: it knows to look about for work, and to halt, which gives the processor back to the hypervisor.
const OF_A_GUEST: &str = "haltpoll";
/// Microseconds that waking may take. A guest has nothing between not sleeping at all and giving the processor back, which it is told to take a
/// microsecond; elsewhere this much lets a processor halt, and not go deeper.
const AWAKE: (i32, i32) = (0, 2);
/// What the kernel takes for no wish.
const ANY: i32 = -1;

/// Does the hypervisor get a processor that idles?
pub fn is_guest() -> bool {
    fs::read_to_string(DRIVER).is_ok_and(|driver| driver.trim() == OF_A_GUEST)
}

/// The wish of this process.
#[derive(Debug)]
pub struct Latency {
    file: File,
    awake: i32,
}

impl Latency {
    /// Wishes nothing yet. Needs root, as a rule.
    pub fn open() -> io::Result<Latency> {
        Latency::at(Path::new(DEVICE))
    }
    /// The same of another file, to try.
    pub fn at(path: &Path) -> io::Result<Latency> {
        let file = File::options().write(true).open(path)?;
        let awake = if is_guest() { AWAKE.0 } else { AWAKE.1 };
        Ok(Latency { file, awake })
    }
    /// From now on idle processors of the machine stay awake, all of them; those that sleep are woken.
    pub fn awake(&self) -> io::Result<()> {
        self.tell(self.awake)
    }
    /// From now on they sleep as they like.
    pub fn sleep(&self) -> io::Result<()> {
        self.tell(ANY)
    }
    fn tell(&self, microseconds: i32) -> io::Result<()> {
        (&self.file).write_all(&microseconds.to_ne_bytes())
    }
}
