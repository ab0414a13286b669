//! A stand-in for the store: whole files and one JSON document. To be thrown away.
#![allow(missing_docs)]

use super::types::*;
use crate::{
    disk::{Disk, Extent, Source},
    error::{Error, Kind, Result},
    units::{BLOCK, Id},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Read,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

pub enum ImportSource<'a> {
    Path(&'a Path),
    Reader(&'a mut dyn Read),
}

#[derive(Clone, Debug)]
pub struct LayerInfo {
    pub id: Id,
    pub parent: Below,
    pub state: &'static str,
    pub size: u64,
    pub allocated: u64,
    pub private_bytes: u64,
    pub names: Vec<String>,
}

#[derive(Clone, Debug, Default)]
pub struct GcReport {
    pub layers: Vec<Id>,
    pub files: Vec<String>,
    pub bytes: u64,
}

pub struct Store {
    path: PathBuf,
}

struct RawDisk(fs::File, u64);
impl Disk for RawDisk {
    fn size(&self) -> u64 {
        self.1
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        buf.fill(0);
        let mut n = 0;
        while n < buf.len() {
            match self.0.read_at(&mut buf[n..], at + n as u64) {
                Ok(0) => break,
                Ok(k) => n += k,
                Err(e) => return Err(Error::io("read", "toy", &e)),
            }
        }
        Ok(())
    }
    fn write(&self, _: &[u8], _: u64) -> Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Ok(())
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn extents(&self, at: u64, len: u64) -> Result<Vec<Extent>> {
        let mut out: Vec<Extent> = Vec::new();
        let mut pos = at;
        let end = (at + len).min(self.1);
        let mut block = vec![0; BLOCK as usize];
        while pos < end {
            self.read(&mut block, pos)?;
            let from = if block.iter().all(|b| *b == 0) {
                Source::Absent
            } else {
                Source::Base
            };
            match out.last_mut() {
                Some(e) if e.from == from => e.len += BLOCK,
                _ => out.push(Extent {
                    at: pos,
                    len: BLOCK,
                    from,
                }),
            }
            pos += BLOCK;
        }
        Ok(out)
    }
}

fn random_id() -> Id {
    let mut id = [0; 16];
    fs::File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut id)
        .unwrap();
    Id(id)
}

fn to_json(o: &Object) -> Value {
    json!({"name": o.name, "kind": o.kind.word(), "id": o.id.to_string(), "size": o.size,
        "parent": o.parent.map(|p| p.id().to_string()), "base": matches!(o.parent, Some(Below::Base(_))),
        "created": o.created, "message": o.message})
}

fn from_json(v: &Value) -> Object {
    let id = |v: &Value| Id::parse(v.as_str().unwrap()).unwrap();
    Object {
        name: v["name"].as_str().unwrap().into(),
        kind: match v["kind"].as_str().unwrap() {
            "base" => ObjectKind::Base,
            "snap" => ObjectKind::Snapshot,
            "image" => ObjectKind::Image,
            _ => ObjectKind::Disk,
        },
        id: id(&v["id"]),
        size: v["size"].as_u64().unwrap(),
        parent: v["parent"].as_str().map(|_| {
            let parent = id(&v["parent"]);
            if v["base"].as_bool().unwrap() {
                Below::Base(parent)
            } else {
                Below::Layer(parent)
            }
        }),
        created: v["created"].as_u64().unwrap(),
        message: v["message"].as_str().map(str::to_string),
    }
}

fn now() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

impl Store {
    pub fn init(path: &Path) -> Result<Store> {
        if path.join("toy.json").exists() {
            return Err(Error::new(
                Kind::Exists,
                format!("there is a store at {}", path.display()),
            ));
        }
        fs::create_dir_all(path).map_err(|e| Error::io("create", path, &e))?;
        let store = Store { path: path.into() };
        store.save(&[])?;
        Ok(store)
    }
    pub fn open(path: &Path) -> Result<Store> {
        if !path.join("toy.json").exists() {
            return Err(Error::new(
                Kind::NoStore,
                format!("there is no store at {}", path.display()),
            ));
        }
        Ok(Store { path: path.into() })
    }
    pub fn open_or_init(path: &Path) -> Result<Store> {
        Store::open(path).or_else(|_| Store::init(path))
    }
    fn save(&self, objects: &[Object]) -> Result<()> {
        let all: Vec<Value> = objects.iter().map(to_json).collect();
        let file = self.path.join("toy.json");
        fs::write(&file, serde_json::to_vec(&all).unwrap())
            .map_err(|e| Error::io("write", file, &e))
    }
    pub fn image(&self, id: Id) -> PathBuf {
        self.path.join(format!("{id}.img"))
    }
    pub fn id(&self) -> Id {
        Id([7; 16])
    }
    pub fn path(&self) -> &Path {
        &self.path
    }
    pub fn run_dir(&self) -> PathBuf {
        self.path.join("run")
    }
    pub fn list(&self) -> Result<Vec<Object>> {
        let text = fs::read(self.path.join("toy.json")).unwrap();
        let all: Vec<Value> = serde_json::from_slice(&text).unwrap();
        let mut all: Vec<Object> = all.iter().map(from_json).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }
    fn allocated(&self, id: Id) -> u64 {
        fs::metadata(self.image(id)).map_or(0, |m| m.blocks() * 512)
    }
    pub fn layers(&self) -> Result<Vec<LayerInfo>> {
        let all = self.list()?;
        Ok(all
            .iter()
            .filter_map(|o| {
                Some(LayerInfo {
                    id: o.id,
                    parent: o.parent?,
                    state: if o.kind == ObjectKind::Disk {
                        "writable"
                    } else {
                        "sealed"
                    },
                    size: o.size,
                    allocated: self.allocated(o.id),
                    private_bytes: self.allocated(o.id),
                    names: vec![o.name.clone()],
                })
            })
            .collect())
    }
    pub fn resolve(&self, reference: &str) -> Result<Object> {
        self.list()?
            .into_iter()
            .find(|o| {
                o.name == reference
                    || (reference.len() > 3 && o.id.to_string().starts_with(reference))
            })
            .ok_or_else(|| {
                Error::new(
                    Kind::NotFound,
                    format!("there is no `{reference}` in {}", self.path.display()),
                )
            })
    }
    pub fn details(&self, object: &Object) -> Result<Details> {
        let all = self.list()?;
        let mut chain = Vec::new();
        let mut at = object.clone();
        while let Some(parent) = at.parent {
            chain.push(Below::Layer(at.id));
            at = all.iter().find(|o| o.id == parent.id()).unwrap().clone();
        }
        chain.push(Below::Base(at.id));
        Ok(Details {
            base: BaseInfo {
                id: at.id,
                len: at.size,
                allocated: self.allocated(at.id),
                digest: Some("sha256:0000".into()),
                link: None,
                sums: false,
                path: self.image(at.id),
            },
            depth: chain.len() as u32 - 1,
            private_bytes: if object.parent.is_some() {
                self.allocated(object.id)
            } else {
                0
            },
            zero_blocks: 0,
            allocated: self.allocated(object.id),
            state: match object.kind {
                ObjectKind::Base => "base",
                ObjectKind::Disk => "writable",
                _ => "sealed",
            },
            chain,
            usage: self.usage(object)?,
            object: object.clone(),
        })
    }
    pub fn usage(&self, object: &Object) -> Result<Usage> {
        let used = self.allocated(object.id);
        Ok(Usage {
            size: object.size,
            refer: used,
            exclusive: used / 4,
            shared: used - used / 4,
        })
    }
    pub fn import(
        &self,
        source: ImportSource<'_>,
        name: &str,
        _: ImportMode,
        progress: &dyn Progress,
    ) -> Result<Object> {
        self.free(name)?;
        let id = random_id();
        let image = self.image(id);
        match source {
            ImportSource::Path(path) => {
                let total = fs::metadata(path)
                    .map_err(|e| Error::io("read", path, &e))?
                    .len();
                for step in 0..20 {
                    if std::env::var_os("TOY_SLOW").is_some() {
                        std::thread::sleep(std::time::Duration::from_millis(200));
                    }
                    if !progress.update(total / 20 * step, total) {
                        return Err(Error::new(Kind::Interrupted, "interrupted"));
                    }
                }
                run(
                    "cp",
                    &[
                        "--sparse=always",
                        path.to_str().unwrap(),
                        image.to_str().unwrap(),
                    ],
                )?;
            }
            ImportSource::Reader(reader) => {
                let mut out = fs::File::create(&image).unwrap();
                std::io::copy(reader, &mut out)
                    .map_err(|e| Error::io("read", "standard input", &e))?;
            }
        }
        let size = fs::metadata(&image).unwrap().len();
        self.add(vec![Object {
            name: name.into(),
            kind: ObjectKind::Base,
            id,
            size,
            parent: None,
            created: now(),
            message: None,
        }])
    }
    fn free(&self, name: &str) -> Result<()> {
        if name.starts_with('-') {
            return Err(Error::new(
                Kind::Invalid,
                format!("`{name}` cannot be a name: names do not begin with `-`"),
            ));
        }
        match self.resolve(name) {
            Ok(_) => Err(Error::new(
                Kind::Exists,
                format!("there is a `{name}` already"),
            )),
            Err(_) => Ok(()),
        }
    }
    fn add(&self, new: Vec<Object>) -> Result<Object> {
        let mut all = self.list()?;
        let last = new[0].clone();
        all.extend(new);
        self.save(&all)?;
        Ok(last)
    }
    pub fn create(&self, names: &[String], from: &str, size: Option<u64>) -> Result<Vec<Object>> {
        let from = self.resolve(from)?;
        let mut new = Vec::new();
        for name in names {
            self.free(name)?;
            let id = random_id();
            let parent = Some(if from.kind == ObjectKind::Base {
                Below::Base(from.id)
            } else {
                Below::Layer(from.id)
            });
            run(
                "cp",
                &[
                    "--sparse=always",
                    self.image(from.id).to_str().unwrap(),
                    self.image(id).to_str().unwrap(),
                ],
            )?;
            let size = size.unwrap_or(from.size);
            new.push(Object {
                name: name.clone(),
                kind: ObjectKind::Disk,
                id,
                size,
                parent,
                created: now(),
                message: None,
            });
        }
        self.add(new.clone())?;
        Ok(new)
    }
    pub fn snapshot(&self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        let full = format!("{disk}@{name}");
        self.free(&full)?;
        let mut all = self.list()?;
        let disk = all
            .iter_mut()
            .find(|o| o.name == disk)
            .ok_or_else(|| Error::new(Kind::NotFound, "no such disk"))?;
        let id = random_id();
        run(
            "cp",
            &[
                "--sparse=always",
                self.image(disk.id).to_str().unwrap(),
                self.image(id).to_str().unwrap(),
            ],
        )?;
        let snap = Object {
            name: full,
            kind: ObjectKind::Snapshot,
            id,
            size: disk.size,
            parent: disk.parent,
            created: now(),
            message: message.map(str::to_string),
        };
        disk.parent = Some(Below::Layer(id));
        all.push(snap.clone());
        self.save(&all)?;
        Ok(snap)
    }
    pub fn rename(&self, old: &str, new: &str) -> Result<Object> {
        self.free(new)?;
        let mut all = self.list()?;
        let object = all
            .iter_mut()
            .find(|o| o.name == old)
            .ok_or_else(|| Error::new(Kind::NotFound, format!("there is no `{old}`")))?;
        object.name = new.into();
        let object = object.clone();
        self.save(&all)?;
        Ok(object)
    }
    pub fn plan_removal(&self, refs: &[String], recursive: bool) -> Result<RemovePlan> {
        let all = self.list()?;
        let mut names = Vec::new();
        for r in refs {
            let object = self.resolve(r)?;
            let mut ids = vec![object.id];
            let mut found = vec![object.clone()];
            while let Some(id) = ids.pop() {
                for child in all.iter().filter(|o| o.parent.map(Below::id) == Some(id)) {
                    ids.push(child.id);
                    found.insert(0, child.clone());
                }
            }
            if found.len() > 1 && !recursive {
                return Err(
                    Error::new(Kind::Busy, format!("{r} is in use by {}", found[0].name))
                        .hint(format!("`forkdisk rm -r {r} -n` shows all that would go")),
                );
            }
            names.extend(found);
        }
        let frees = names.iter().map(|o: &Object| self.allocated(o.id)).sum();
        Ok(RemovePlan { names, frees })
    }
    pub fn remove(&self, plan: &RemovePlan) -> Result<()> {
        let mut all = self.list()?;
        all.retain(|o| !plan.names.iter().any(|p| p.name == o.name));
        for gone in &plan.names {
            let _ = fs::remove_file(self.image(gone.id));
        }
        self.save(&all)
    }
    pub fn gc(&self, _dry_run: bool) -> Result<GcReport> {
        Ok(GcReport {
            layers: vec![Id([3; 16])],
            files: vec!["names/.tmp".into()],
            bytes: 123_456,
        })
    }
    pub fn open_disk(&self, object: &Object, _writable: bool) -> Result<Arc<dyn Disk>> {
        let image = self.image(object.id);
        Ok(Arc::new(RawDisk(
            fs::File::open(&image).map_err(|e| Error::io("open", image, &e))?,
            object.size,
        )))
    }
    pub fn check(&self, reference: Option<&str>, _progress: &dyn Progress) -> Result<CheckReport> {
        if let Some(r) = reference {
            self.resolve(r)?;
        }
        let mut report = CheckReport {
            checked: self.list()?.len() as u64,
            ..CheckReport::default()
        };
        if self.path.join("toy-leak").exists() {
            report.leaks.push(Finding {
                what: "layers/x.layer".into(),
                message: "nothing needs it".into(),
            });
        }
        if self.path.join("toy-corrupt").exists() {
            report.corruptions.push(Finding {
                what: "layers/y.layer".into(),
                message: "checksum mismatch".into(),
            });
        }
        Ok(report)
    }
}

pub fn run(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(args)
        .output()
        .map_err(|e| Error::io("run", program, &e))?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).trim().to_string());
    }
    let text = String::from_utf8_lossy(&out.stderr).trim().to_string();
    let kind = if text.contains("busy") {
        Kind::Busy
    } else {
        Kind::Io
    };
    Err(Error::new(kind, text))
}
