//! From ids back to names.

use crate::{
    error::Result,
    store::{Object, Store},
    units::Id,
};
use std::collections::HashMap;

/// The names of the objects of a store, by id. One id may have several.
#[derive(Default)]
pub struct Names(HashMap<Id, Vec<String>>);

impl Names {
    /// All names of the store.
    pub fn of(store: &Store) -> Result<Names> {
        Ok(Names::from_ids(&store.called()?))
    }
    /// The names of these objects.
    pub fn from_objects<'a>(objects: impl IntoIterator<Item = &'a Object>) -> Names {
        let mut names = Names::default();
        for object in objects {
            let all = names.0.entry(object.id).or_default();
            all.push(object.name.clone());
        }
        names
    }
    /// These names of these ids.
    pub fn from_ids(all: &[(Id, Vec<String>)]) -> Names {
        Names(all.iter().cloned().collect())
    }
    /// One name of `id`, if it has any.
    pub fn first(&self, id: Id) -> Option<&str> {
        self.0.get(&id)?.first().map(String::as_str)
    }
    /// All names of `id`.
    pub fn all(&self, id: Id) -> &[String] {
        self.0.get(&id).map_or(&[], Vec::as_slice)
    }
    /// One name of `id`, or the beginning of the id in parentheses.
    pub fn show(&self, id: Id) -> String {
        match self.first(id) {
            Some(name) => name.to_string(),
            None => format!("({})", id.short()),
        }
    }
}
