//! What one disk may hold.

use super::Verdict;
use std::ops::Range;
use std::sync::Arc;

const BLOCK: usize = 4096;

/// A state that may be found although nobody was told that it is durable.
#[derive(Clone)]
pub struct Attempt {
    contents: Arc<Vec<u8>>,
    /// A disk that met an error may have flushed by itself in the middle of a write: in this range each block may also be that of `other`.
    blur: Option<(Range<u64>, Arc<Vec<u8>>)>,
}

impl Attempt {
    pub fn of(contents: Arc<Vec<u8>>) -> Attempt {
        Attempt {
            contents,
            blur: None,
        }
    }
    pub fn blurred(contents: Arc<Vec<u8>>, range: Range<u64>, other: Arc<Vec<u8>>) -> Attempt {
        Attempt {
            contents,
            blur: Some((range, other)),
        }
    }
    /// The same with another size: what is added is zeros.
    pub fn sized(&self, size: u64) -> Attempt {
        let sized = |contents: &Arc<Vec<u8>>| {
            let mut new = contents.to_vec();
            new.resize(size as usize, 0);
            Arc::new(new)
        };
        Attempt {
            contents: sized(&self.contents),
            blur: self.blur.as_ref().map(|(range, other)| {
                let range = range.start.min(size)..range.end.min(size);
                (range, sized(other))
            }),
        }
    }
    pub fn len(&self) -> u64 {
        self.contents.len() as u64
    }
    pub fn matches(&self, found: &[u8]) -> bool {
        let Some((range, other)) = &self.blur else {
            return found == &self.contents[..];
        };
        let blurred = range.start as usize / BLOCK..(range.end as usize).div_ceil(BLOCK);
        found.len() == self.contents.len()
            && found.chunks(BLOCK).enumerate().all(|(i, block)| {
                let at = i * BLOCK..i * BLOCK + block.len();
                block == &self.contents[at.clone()] || blurred.contains(&i) && block == &other[at]
            })
    }
}

/// A disk of the model.
#[derive(Clone)]
pub struct Model {
    pub now: Arc<Vec<u8>>,
    pub flushed: Arc<Vec<u8>>,
    /// The contents at flushes that were begun after that and not acknowledged.
    pub attempted: Vec<Attempt>,
    /// The contents before `flushed`, where it stands in the last commit of a layer that is not closed: rot of that commit looks like a
    /// power cut.
    pub earlier: Option<Arc<Vec<u8>>>,
}

impl Model {
    pub fn new(contents: Arc<Vec<u8>>) -> Model {
        Model {
            now: contents.clone(),
            flushed: contents,
            attempted: Vec::new(),
            earlier: None,
        }
    }
    pub fn acknowledge(&mut self, contents: Arc<Vec<u8>>) {
        let last = std::mem::replace(&mut self.flushed, contents);
        if last != self.flushed {
            self.earlier = Some(last);
        }
        self.attempted.clear();
    }
    /// Exactly one flush: the last that was acknowledged, or one that was begun after it.
    pub fn verdict(&self, found: &[u8]) -> Verdict {
        if found == &self.flushed[..] {
            return Ok(self.flushed.clone());
        }
        match self.attempted.iter().find(|a| a.matches(found)) {
            Some(attempt) if attempt.blur.is_none() => Ok(attempt.contents.clone()),
            Some(_) => Ok(Arc::new(found.to_vec())),
            None => Err(self.wrong(found)),
        }
    }
    fn wrong(&self, found: &[u8]) -> String {
        let blocks = |other: &[u8]| -> Vec<usize> {
            let pairs = found.chunks(BLOCK).zip(other.chunks(BLOCK));
            let unlike = pairs.enumerate().filter(|(_, (a, b))| a != b);
            unlike.map(|(i, _)| i).take(10).collect()
        };
        let attempts: Vec<_> = self.attempted.iter().map(|a| blocks(&a.contents)).collect();
        format!(
            "is neither its last flush nor one under way: blocks unlike the last flush {:?}, unlike the attempts {attempts:?}, unlike what \
             was written in all {:?}",
            blocks(&self.flushed),
            blocks(&self.now)
        )
    }
}
