//! Finding what has no name: to look at it, never to change it.

use super::{Below, Object, ObjectKind, Store, parent_of};
use crate::error::{Error, Kind, Result};
use crate::io::EntryKind;
use crate::units::{BLOCK, Id, blocks};

impl Store {
    /// [`Store::resolve`]; and where no name is meant, the layer or base without a name whose id begins with `reference` (at least four
    /// digits). Such an object is called by its id.
    pub fn resolve_any(&self, reference: &str) -> Result<Object> {
        let _lock = self.lock(false)?;
        match self.resolve_locked(reference) {
            Err(e) if e.kind() == Kind::NotFound => self.unnamed(reference)?.ok_or(e),
            other => other,
        }
    }
    /// Does `work` on what a reference means ([`Store::resolve_any`]). A disk may be another layer by the time it is looked at: who rolls it back, or
    /// removes it, waits for nobody who looks. Then `work` fails as if there were damage, and is done once more on what the reference means now.
    pub fn with_object<T>(
        &self,
        reference: &str,
        mut work: impl FnMut(&Object) -> Result<T>,
    ) -> Result<T> {
        let mut object = self.resolve_any(reference)?;
        loop {
            let e = match work(&object) {
                Err(e) if matches!(e.kind(), Kind::Corrupt | Kind::NotFound) => e,
                other => return other,
            };
            let now = self.resolve_any(reference)?;
            if now.id == object.id {
                return Err(e);
            }
            object = now;
        }
    }
    fn unnamed(&self, reference: &str) -> Result<Option<Object>> {
        let digit = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        if reference.len() < 4 || !reference.bytes().all(digit) {
            return Ok(None);
        }
        let mut found = Vec::new();
        for (file, kind) in self.layers.list()? {
            let id = file.strip_suffix(".layer").and_then(Id::parse);
            if kind == EntryKind::File && file.starts_with(reference) {
                found.extend(id.map(Below::Layer));
            }
        }
        for (dir, kind) in self.bases.list()? {
            if kind == EntryKind::Dir && dir.starts_with(reference) {
                found.extend(Id::parse(&dir).map(Below::Base));
            }
        }
        match found[..] {
            [] => Ok(None),
            [one] => self.as_object(one).map(Some),
            _ => {
                let list: Vec<String> = found.iter().map(|b| b.id().to_string()).collect();
                Err(Error::new(
                    Kind::Invalid,
                    format!("`{reference}` could be any of {}", list.join(", ")),
                )
                .hint("give more digits of the id"))
            }
        }
    }
    /// A layer or base that no name refers to.
    fn as_object(&self, below: Below) -> Result<Object> {
        let object = |kind, size, parent, created| Object {
            name: below.id().to_string(),
            kind,
            id: below.id(),
            size,
            parent,
            created,
            message: None,
        };
        match below {
            Below::Base(id) => {
                let len = self.base_meta(id)?.len;
                Ok(object(ObjectKind::Base, blocks(len) * BLOCK, None, 0))
            }
            Below::Layer(id) => {
                let (header, size, _) = self.layer_head(id)?;
                let (state, _, _) = self.layer_counts(id)?;
                let kind = match state {
                    crate::layer::State::Sealed => ObjectKind::Image,
                    _ => ObjectKind::Disk,
                };
                let created = header.created.get();
                Ok(object(kind, size, Some(parent_of(&header)), created))
            }
        }
    }
}
