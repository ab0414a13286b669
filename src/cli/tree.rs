//! What stands on what: `tree`.

use crate::{
    cli::{
        Outcome,
        context::Context,
        list::paths,
        render::{
            json::DamageDoc,
            table::{Align, Table},
            time,
            tree::strokes,
        },
        ui::{Paint, Ui},
    },
    daemon::Attached,
    error::Result,
    store::{Below, Damage, Found, LayerInfo, Object, ObjectKind, Store, Usage},
    units::Id,
};
use clap::Args;
use serde::Serialize;
use std::{
    collections::{HashMap, HashSet},
    path::PathBuf,
};

/// Show what stands on what, and what each holds of its own
#[derive(Args, Debug)]
#[command(
    after_help = "+SIZE is the data of an object's own layer. \u{25cf} marks what is attached.\n\
        -H has columns: depth in the tree, names, kind, size, data of its own layer, created, device, id, parent's id. What is not known is `-`."
)]
pub(crate) struct Tree {
    /// Show only this and what stands on it
    #[arg(value_name = "REF")]
    reference: Option<String>,
    /// For scripts: tabs between columns, no heading, no lines
    #[arg(short = 'H', long)]
    no_header: bool,
    /// Exact numbers: bytes, and seconds since 1970
    #[arg(short, long)]
    parsable: bool,
}

/// A base or a layer, with all its names.
struct Node {
    id: Id,
    depth: usize,
    parent: Option<Below>,
    objects: Vec<Object>,
    /// The layer; `None` for a base.
    layer: Option<LayerInfo>,
    /// Of a base.
    base: Option<BaseInfo>,
    attached: Vec<(Attached, Vec<PathBuf>)>,
}

/// What is told of a base.
#[derive(Clone, Copy)]
struct BaseInfo {
    size: u64,
    data: u64,
    allocated: u64,
}

impl Node {
    fn kind(&self) -> &'static str {
        match (self.objects.first(), self.parent) {
            (Some(object), _) => object.kind.word(),
            (None, Some(_)) => "layer",
            (None, None) => "base",
        }
    }
    fn names(&self) -> Vec<&str> {
        self.objects.iter().map(|o| o.name.as_str()).collect()
    }
    fn label(&self) -> String {
        if self.objects.is_empty() {
            format!("({})", self.id.short())
        } else {
            self.names().join(", ")
        }
    }
    fn size(&self) -> u64 {
        let of_layer = self.layer.as_ref().map(|l| l.size);
        let of_object = self.objects.first().map(|o| o.size);
        of_object
            .or(of_layer)
            .or(self.base.map(|b| b.size))
            .unwrap_or(0)
    }
    /// The amount: the size of a base, what a layer adds.
    fn amount(&self, ui: &Ui, exact: bool) -> String {
        let size = |bytes| shown(ui, exact, bytes);
        match &self.layer {
            Some(layer) => format!("+{}", size(layer.private_bytes)),
            None => size(self.size()),
        }
    }
    /// Its cells for scripts.
    fn script(&self, ui: &Ui, exact: bool, now: u64) -> Vec<String> {
        let known = |text: Option<String>| text.unwrap_or_else(|| "-".to_string());
        let names = match &self.objects[..] {
            [] => None,
            _ => Some(self.names().join(",")),
        };
        let created = self.objects.first().map(|o| match exact {
            true => o.created.to_string(),
            false => time::ago(o.created, now),
        });
        let device = self.attached.first().map(|(a, _)| {
            let file = || a.file.display().to_string();
            a.device.clone().unwrap_or_else(file)
        });
        let private = self.layer.as_ref().map(|l| l.private_bytes);
        vec![
            self.depth.to_string(),
            known(names),
            self.kind().to_string(),
            shown(ui, exact, self.size()),
            known(private.map(|bytes| shown(ui, exact, bytes))),
            known(created),
            known(device),
            self.id.to_string(),
            known(self.parent.map(|below| below.id().to_string())),
        ]
    }
    /// Where it is in use, else how old it is.
    fn place(&self, ui: &Ui, now: u64) -> String {
        let mut places = Vec::new();
        for (attached, mounts) in &self.attached {
            let shown = attached.device.clone();
            let shown = shown.unwrap_or_else(|| attached.file.display().to_string());
            places.push(match &mounts[..] {
                [] => shown,
                mounts => format!("{shown} on {}", paths(mounts)),
            });
        }
        if !places.is_empty() {
            return places.join(", ");
        }
        match self.objects.first() {
            Some(o) if o.kind == ObjectKind::Base => {
                let data = self.base.map(|b| format!("data {}", ui.size(b.data)));
                data.unwrap_or_default()
            }
            Some(o) if o.kind != ObjectKind::Disk => time::ago(o.created, now),
            _ => String::new(),
        }
    }
    fn message(&self) -> String {
        let mut messages = self.objects.iter().filter_map(|o| o.message.as_deref());
        messages
            .next()
            .map_or(String::new(), |m| format!("\"{m}\""))
    }
}

/// A size for people, or exactly.
fn shown(ui: &Ui, exact: bool, bytes: u64) -> String {
    match exact {
        true => bytes.to_string(),
        false => ui.size(bytes),
    }
}

impl Tree {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let store = context.open()?;
        let root = self.reference.map(|r| store.resolve_any(&r)).transpose()?;
        let (nodes, damaged) = walk(context, &store, root.map(|object| object.id))?;
        let ui = &context.ui;
        if ui.json {
            let nodes = nodes.iter().map(NodeDoc::new);
            ui.document(TreeDoc {
                nodes: nodes.collect(),
                damaged: DamageDoc::all(&damaged),
            })?;
            return ui.damage(&damaged);
        }
        let now = time::now();
        if self.no_header {
            let mut table = Table::new(vec![(String::new(), Align::Left); 9]);
            for node in &nodes {
                table.row(node.script(ui, self.parsable, now));
            }
            ui.data(table.script())?;
            return ui.damage(&damaged);
        }
        if nodes.is_empty() {
            ui.talk("the store is empty: `forkdisk import FILE` brings an image in");
            return ui.damage(&damaged);
        }
        let depths: Vec<usize> = nodes.iter().map(|n| n.depth).collect();
        let any = nodes.iter().any(|n| !n.attached.is_empty());
        let mut table = Table::new(vec![(String::new(), Align::Left); 4 + usize::from(any)]);
        for (node, strokes) in nodes.iter().zip(strokes(&depths)) {
            let mut row = vec![format!("{strokes}{}", node.label())];
            if any {
                let dot = if node.attached.is_empty() {
                    ""
                } else {
                    "\u{25cf}"
                };
                row.push(dot.to_string());
            }
            let mut last = vec![node.place(ui, now), node.message()];
            last.retain(|text| !text.is_empty());
            row.extend([
                node.kind().to_string(),
                node.amount(ui, self.parsable),
                last.join("  "),
            ]);
            table.row(row);
        }
        // Coloured when the columns stand: colour has no width.
        let dot = ui.paint(Paint::Good, "\u{25cf}");
        ui.data(table.text(false).replace('\u{25cf}', &dot))?;
        ui.damage(&damaged)
    }
}

/// All nodes from the roots down, or from `root`: parents before children, siblings by name.
/// And what is damaged, which is no part of it.
fn walk(context: &Context, store: &Store, root: Option<Id>) -> Result<(Vec<Node>, Vec<Damage>)> {
    let mut objects: HashMap<Id, Vec<Object>> = HashMap::new();
    let Found {
        sound: all,
        mut damaged,
    } = store.survey()?;
    for object in all {
        objects.entry(object.id).or_default().push(object);
    }
    let mut attached: HashMap<Id, Vec<(Attached, Vec<PathBuf>)>> = HashMap::new();
    for (a, mounts) in context.attached_for_show(store) {
        attached.entry(a.id).or_default().push((a, mounts));
    }
    let mut layers: HashMap<Id, LayerInfo> = HashMap::new();
    let mut children: HashMap<Id, Vec<Id>> = HashMap::new();
    // Bases without a name show only as the parents of others.
    let mut roots: HashSet<Id> = objects
        .values()
        .filter(|all| all[0].kind == ObjectKind::Base)
        .map(|all| all[0].id)
        .collect();
    let found = store.layers()?;
    damaged.extend(found.damaged);
    for layer in found.sound {
        children
            .entry(layer.parent.id())
            .or_default()
            .push(layer.id);
        layers.insert(layer.id, layer);
    }
    roots.extend(children.keys().filter(|id| !layers.contains_key(id)));
    let name = |id: &Id| match objects.get(id) {
        Some(all) => (false, natural(&all[0].name)),
        None => (true, natural(&id.to_string())),
    };
    for siblings in children.values_mut() {
        // Backwards, as they are taken from the end of a stack.
        siblings.sort_by_cached_key(|id| std::cmp::Reverse(name(id)));
    }
    // One that cannot be looked at is told of by `check`.
    let nameless = roots.iter().filter(|id| !objects.contains_key(id));
    let nameless: Vec<Object> = nameless
        .filter_map(|id| store.resolve_any(&id.to_string()).ok())
        .collect();
    let mut stack: Vec<(Id, usize)> = match root {
        Some(id) => vec![(id, 0)],
        None => {
            let mut roots: Vec<Id> = roots.into_iter().collect();
            roots.sort_by_cached_key(|id| std::cmp::Reverse(name(id)));
            roots.into_iter().map(|id| (id, 0)).collect()
        }
    };
    let bases = bases_of(store, &objects, nameless.into_iter())?;
    damaged.extend(bases.damaged);
    let known = |(object, usage): (Object, Usage)| {
        let info = BaseInfo {
            size: object.size,
            data: usage.refer,
            allocated: usage.allocated,
        };
        (object.id, info)
    };
    let mut bases: HashMap<Id, BaseInfo> = bases.sound.into_iter().map(known).collect();
    let mut nodes = Vec::new();
    while let Some((id, depth)) = stack.pop() {
        let below = children.remove(&id).unwrap_or_default();
        stack.extend(below.into_iter().map(|child| (child, depth + 1)));
        let objects = objects.remove(&id).unwrap_or_default();
        let layer = layers.remove(&id);
        nodes.push(Node {
            id,
            depth,
            parent: layer.as_ref().map(|l| l.parent),
            objects,
            base: bases.remove(&id),
            layer,
            attached: attached.remove(&id).unwrap_or_default(),
        });
    }
    Ok((nodes, damaged))
}

/// What the bases hold, with one look at the store.
fn bases_of(
    store: &Store,
    objects: &HashMap<Id, Vec<Object>>,
    nameless: impl Iterator<Item = Object>,
) -> Result<Found<(Object, Usage)>> {
    let named = objects.values().filter_map(|all| all.first());
    let bases = named.filter(|o| o.kind == ObjectKind::Base).cloned();
    store.usages(bases.chain(nameless).collect())
}

/// A key that orders `web-2` before `web-10`.
fn natural(name: &str) -> Vec<(String, Option<u64>)> {
    let mut key = Vec::new();
    let mut rest = name;
    while !rest.is_empty() {
        let word = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let (word, tail) = rest.split_at(word);
        let digits = tail
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (digits, tail) = tail.split_at(digits);
        // No number comes before any.
        let number = (!digits.is_empty()).then(|| digits.parse().unwrap_or(u64::MAX));
        key.push((word.to_string(), number));
        rest = tail;
    }
    key
}

#[derive(Serialize)]
struct TreeDoc {
    nodes: Vec<NodeDoc>,
    damaged: Vec<DamageDoc>,
}

/// A flat list with depths, not nested documents: JSON readers limit how deep they go.
#[derive(Serialize)]
struct NodeDoc {
    depth: usize,
    name: Option<String>,
    names: Vec<String>,
    kind: &'static str,
    id: String,
    size: u64,
    parent_id: Option<String>,
    private_bytes: u64,
    allocated: Option<u64>,
    state: &'static str,
    created: Option<u64>,
    message: Option<String>,
    attached: bool,
    device: Option<String>,
    mounts: Vec<PathBuf>,
}

impl NodeDoc {
    fn new(node: &Node) -> NodeDoc {
        let first = node.objects.first();
        let attached = node.attached.first();
        NodeDoc {
            depth: node.depth,
            name: first.map(|o| o.name.clone()),
            names: node.names().iter().map(|n| n.to_string()).collect(),
            kind: node.kind(),
            id: node.id.to_string(),
            size: node.size(),
            parent_id: node.parent.map(|below| below.id().to_string()),
            private_bytes: node.layer.as_ref().map_or(0, |l| l.private_bytes),
            allocated: node
                .layer
                .as_ref()
                .map(|l| l.allocated)
                .or(node.base.map(|b| b.allocated)),
            state: node.layer.as_ref().map_or("base", |l| l.state),
            created: first.map(|o| o.created),
            message: first.and_then(|o| o.message.clone()),
            attached: attached.is_some(),
            device: attached.and_then(|(a, _)| a.device.clone()),
            mounts: node.attached.iter().flat_map(|(_, m)| m.clone()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_names_are_counted() {
        let mut names = [
            "web-10", "web-2", "h2", "h", "db", "web-2@b", "web-2@a", "web",
        ];
        names.sort_by_cached_key(|name| natural(name));
        assert_eq!(
            names,
            [
                "db", "h", "h2", "web", "web-2", "web-2@a", "web-2@b", "web-10"
            ]
        );
    }
}
