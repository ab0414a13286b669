//! A stand-in for the daemon: losetup and one JSON document. To be thrown away.
#![allow(missing_docs)]

use crate::{
    error::{Error, Kind, Result},
    store::{Object, ObjectKind, Store, stub::run as sh},
    units::Id,
};
use serde_json::{Value, json};
use std::path::PathBuf;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Via {
    Loop,
    File,
}

pub struct AttachRequest {
    pub reference: String,
    pub via: Via,
    pub read_only: bool,
    pub block_size: u32,
}

#[derive(Clone, Debug)]
pub struct Attached {
    pub name: String,
    pub id: Id,
    pub kind: ObjectKind,
    pub read_only: bool,
    pub via: Via,
    pub device: Option<String>,
    pub file: PathBuf,
    pub count: u32,
    pub size: u64,
}

pub struct Client {
    store: PathBuf,
}

fn load(store: &std::path::Path) -> Vec<Value> {
    std::fs::read(store.join("attached.json"))
        .map_or(Vec::new(), |t| serde_json::from_slice(&t).unwrap())
}

impl Client {
    pub fn connect(store: &Store) -> Result<Option<Client>> {
        let any = store.path().join("attached.json").exists();
        Ok(any.then(|| Client {
            store: store.path().into(),
        }))
    }
    pub fn connect_or_start(store: &Store) -> Result<Client> {
        Ok(Client {
            store: store.path().into(),
        })
    }
    fn store(&self) -> Result<Store> {
        Store::open(&self.store)
    }
    fn save(&self, all: &[Value]) {
        std::fs::write(
            self.store.join("attached.json"),
            serde_json::to_vec(all).unwrap(),
        )
        .unwrap();
    }
    pub fn attach(&mut self, request: &AttachRequest) -> Result<Attached> {
        let store = self.store()?;
        let object = store.resolve(&request.reference)?;
        let mut all = load(&self.store);
        if all.iter().any(|v| v["name"] == object.name.as_str()) {
            return Err(Error::new(
                Kind::Busy,
                format!("{} is attached", object.name),
            ));
        }
        let file = store.image(object.id);
        let read_only = request.read_only || object.kind != ObjectKind::Disk;
        let device = if request.via == Via::Loop {
            let size = request.block_size.to_string();
            let mut args = vec!["-f", "--show", "-b", &size];
            if read_only {
                args.push("-r");
            }
            args.push(file.to_str().unwrap());
            Some(sh("losetup", &args)?)
        } else {
            None
        };
        all.push(json!({"name": object.name, "ro": read_only, "loop": request.via == Via::Loop, "device": device}));
        self.save(&all);
        Ok(self.attached()?.pop().unwrap())
    }
    pub fn detach(&mut self, target: &str) -> Result<Vec<Attached>> {
        let gone: Vec<Attached> = self
            .attached()?
            .into_iter()
            .filter(|a| a.name == target || a.device.as_deref() == Some(target))
            .collect();
        for a in &gone {
            if let Some(device) = &a.device {
                sh("losetup", &["-d", device])?;
            }
        }
        let mut all = load(&self.store);
        all.retain(|v| !gone.iter().any(|a| v["name"] == a.name.as_str()));
        self.save(&all);
        Ok(gone)
    }
    pub fn attached(&mut self) -> Result<Vec<Attached>> {
        let store = self.store()?;
        load(&self.store)
            .iter()
            .map(|v| {
                let object = store.resolve(v["name"].as_str().unwrap())?;
                Ok(Attached {
                    id: object.id,
                    kind: object.kind,
                    read_only: v["ro"].as_bool().unwrap(),
                    via: if v["loop"].as_bool().unwrap() {
                        Via::Loop
                    } else {
                        Via::File
                    },
                    device: v["device"].as_str().map(str::to_string),
                    file: store.image(object.id),
                    count: 1,
                    size: object.size,
                    name: object.name,
                })
            })
            .collect()
    }
    pub fn snapshot(&mut self, disk: &str, name: &str, message: Option<&str>) -> Result<Object> {
        sh("sync", &[])?;
        self.store()?.snapshot(disk, name, message)
    }
    pub fn create(
        &mut self,
        names: &[String],
        from: &str,
        size: Option<u64>,
    ) -> Result<Vec<Object>> {
        sh("sync", &[])?;
        self.store()?.create(names, from, size)
    }
    pub fn status(&mut self) -> Result<Value> {
        Ok(
            json!({"keeper_pid": 1, "server_pid": 2, "socket": self.store.join("run/socket"),
            "mount": self.store.join("run/mount"), "attached": load(&self.store).len(), "uptime": 61}),
        )
    }
    pub fn stop(&mut self) -> Result<()> {
        let _ = std::fs::remove_file(self.store.join("attached.json"));
        Ok(())
    }
}

pub fn run(_store: Store, _foreground: bool) -> Result<()> {
    Err(Error::new(Kind::Unsupported, "the daemon is not built yet"))
}
