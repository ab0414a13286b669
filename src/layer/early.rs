//! Which slots are to be written back before a flush asks for it, and how far writers may be ahead of the disk.
//!
//! A flush holds up the whole device above it, so it must find little left to do: each [`PIECE`] of what was written is sent on its way at once,
//! and who writes while more than [`BEHIND`] is still on its way waits until the oldest of it has arrived. Not so for what is scattered: there are as many
//! requests as blocks, so whoever sends it waits for the queue of the device, which is shorter than that; and to ask how much of a wide range has arrived
//! takes longer than to write (a look at each of its pages).

use crate::sync::Mutex;
use std::collections::VecDeque;
use std::ops::Range;

/// Slots sent on their way together: 1 MiB.
const PIECE: u32 = 256;
/// Slots that may be on their way: 64 MiB.
const BEHIND: u64 = 16384;

/// A piece that lies in more than so many times its slots is scattered.
const SCATTERED: u32 = 4;

#[derive(Default)]
struct State {
    /// From the lowest to the highest of what was written and is not on its way yet, and how many they are.
    next: Range<u32>,
    slots: u32,
    /// On their way: ranges and how many slots of each were written, the oldest first.
    sent: VecDeque<(Range<u32>, u32)>,
    total: u64,
}

/// What a writer has to do for the disk.
#[derive(Debug, PartialEq, Eq)]
pub struct Errand {
    /// Send this on its way.
    pub send: Range<u32>,
    /// Then wait until this has arrived.
    pub wait: Option<Range<u32>>,
}

/// See the module.
#[derive(Default)]
pub struct Early(Mutex<State>);

impl Early {
    /// Slots were written.
    pub fn wrote(&self, start: u32, len: u32) -> Option<Errand> {
        let mut s = self.0.lock();
        s.next = match s.slots {
            0 => start..start + len,
            _ => s.next.start.min(start)..s.next.end.max(start + len),
        };
        s.slots += len;
        if s.slots < PIECE {
            return None;
        }
        let (send, slots) = (s.next.clone(), s.slots);
        s.slots = 0;
        if send.end - send.start > SCATTERED * slots {
            return Some(Errand { send, wait: None });
        }
        s.total += u64::from(slots);
        s.sent.push_back((send.clone(), slots));
        let mut wait = None;
        if s.total > BEHIND
            && let Some((oldest, slots)) = s.sent.pop_front()
        {
            s.total -= u64::from(slots);
            wait = Some(oldest);
        }
        Some(Errand { send, wait })
    }
    /// All that was written has arrived.
    pub fn arrived(&self) {
        *self.0.lock() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_go_and_writers_stay_near() {
        let early = Early::default();
        for i in 0..PIECE - 1 {
            assert_eq!(early.wrote(100 + i, 1), None);
        }
        let last = early.wrote(50, 1).unwrap();
        assert_eq!((last.send, last.wait), (50..100 + PIECE - 1, None));
        let mut waited = 0;
        for i in 1..=2 * BEHIND as u32 / PIECE {
            let errand = early.wrote(i * PIECE, PIECE).unwrap();
            assert_eq!(errand.send, i * PIECE..(i + 1) * PIECE);
            waited += u32::from(errand.wait.is_some());
        }
        assert_eq!(waited, BEHIND as u32 / PIECE + 1);
        early.arrived();
        assert_eq!(early.wrote(7, PIECE).unwrap().wait, None);
    }
}
