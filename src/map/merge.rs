//! Laying block maps over each other.

use super::{Item, Items, RegionMap};
use crate::error::Result;
use crate::units::Region;

struct Source<'a> {
    items: Items<'a>,
    /// The item under way; a zero range may be partly used up.
    head: Option<Item>,
}

impl Source<'_> {
    fn advance(&mut self) -> Result<()> {
        self.head = self.items.next().transpose()?;
        Ok(())
    }
    /// Uses up everything before region `end`.
    fn skip_to(&mut self, end: u32) -> Result<()> {
        while let Some(head) = &mut self.head {
            if head.end() <= end {
                self.advance()?;
                continue;
            }
            if let Item::Zeros(start, count) = head
                && start.0 < end
            {
                *count -= end - start.0;
                *start = Region(end);
            }
            break;
        }
        Ok(())
    }
}

/// Merges maps, the newest first, into one: for every block the first source that knows it decides. Memory is one item for
/// each source.
pub fn merge<'a>(sources: Vec<Items<'a>>) -> impl Iterator<Item = Result<Item>> + 'a {
    let mut sources: Vec<Source<'a>> = sources
        .into_iter()
        .map(|items| Source { items, head: None })
        .collect();
    let mut started = false;
    let mut failed = false;
    std::iter::from_fn(move || {
        if failed {
            return None;
        }
        let next = step(&mut sources, &mut started);
        failed = next.is_err();
        next.transpose()
    })
}

fn step(sources: &mut [Source<'_>], started: &mut bool) -> Result<Option<Item>> {
    if !*started {
        for s in sources.iter_mut() {
            s.advance()?;
        }
        *started = true;
    }
    let Some(at) = sources
        .iter()
        .filter_map(|s| s.head.as_ref().map(Item::start))
        .min()
    else {
        return Ok(None);
    };
    // How far the same sources say the same kind of thing.
    let mut end = u32::MAX;
    let mut map: Option<RegionMap> = None;
    let mut zero = false;
    for s in sources.iter() {
        let Some(head) = &s.head else { continue };
        if head.start() > at {
            if !zero {
                end = end.min(head.start());
            }
            continue;
        }
        if zero {
            continue;
        }
        end = end.min(head.end());
        match head {
            Item::Region(_, m) => match &mut map {
                Some(upper) => upper.underlay(m),
                None => map = Some(m.clone()),
            },
            Item::Zeros(..) => {
                zero = true;
                if let Some(upper) = &mut map {
                    upper.underlay(&RegionMap::zeros());
                }
            }
        }
    }
    let item = match map {
        Some(map) => {
            end = at + 1;
            Item::Region(Region(at), map)
        }
        None => Item::Zeros(Region(at), end - at),
    };
    for s in sources.iter_mut() {
        s.skip_to(end)?;
    }
    Ok(Some(item))
}
