//! States of objects for `export`, `map` and `diff`, also of disks that are attached for writing.

use crate::{
    cli::context::Context,
    daemon::Client,
    error::{Kind, Result},
    store::{Below, Object, ObjectKind, State, Store},
};
use std::time::{Duration, Instant};

/// How often a disk that is written to is opened again because its writer has used a place anew.
const TRIES: u32 = 20;

/// How long what is attached read-only is waited for, while another command changes it.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at meanwhile.
const STEP: Duration = Duration::from_millis(20);

/// Who has an object.
enum Owner {
    /// Nobody who could write to it.
    None,
    /// The daemon, for writing.
    Writer(Client),
    /// The daemon, for reading: another command may change it for a moment.
    Reader,
}

fn owner(context: &Context, store: &Store, object: &Object) -> Result<Owner> {
    if object.kind != ObjectKind::Disk {
        return Ok(Owner::None);
    }
    Ok(match context.daemon_of(store, &object.name)? {
        None => Owner::None,
        Some((_, attached)) if attached.read_only => Owner::Reader,
        Some((daemon, _)) => Owner::Writer(daemon),
    })
}

/// Does `work` with a disk that is attached read-only, as soon as nobody changes it.
pub(crate) fn patiently<T>(mut work: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match work() {
            Err(e) if e.kind() == Kind::Busy && Instant::now() < deadline => {
                std::thread::sleep(STEP);
            }
            other => return other,
        }
    }
}

/// The state of a disk that is attached read-only.
fn state_for_readers(store: &Store, name: &str) -> Result<State> {
    // It may have got another layer meanwhile.
    patiently(|| store.state(&store.resolve(name)?))
}

/// The present state of an object, which stays as it is however long it is read: that of a disk which is attached for writing
/// is sealed for it, if it has changed since it was sealed last.
pub(crate) fn settled(context: &Context, store: &Store, object: &Object) -> Result<State> {
    match owner(context, store, object)? {
        Owner::Writer(mut daemon) => {
            let before = with_points(store, vec![object.clone()]);
            let state = store.state_of(daemon.settle(&object.name)?)?.of_a_disk();
            tell_of_histories(context, store, &before);
            Ok(state)
        }
        Owner::Reader => state_for_readers(store, &object.name),
        Owner::None => store.state(object),
    }
}

/// The disks that have a part of their history in these layers, and how many points they have.
pub(crate) fn histories_in(store: &Store, layers: &[Below]) -> Result<Vec<(Object, usize)>> {
    Ok(with_points(store, store.histories_in(layers)?))
}

/// Disks, and how many points their histories have, as far as can be told.
pub(crate) fn with_points(store: &Store, disks: Vec<Object>) -> Vec<(Object, usize)> {
    let with_points = disks.into_iter().map(|disk| {
        let points = points(store, &disk);
        (disk, points)
    });
    with_points.collect()
}

fn points(store: &Store, disk: &Object) -> usize {
    match disk.kind {
        ObjectKind::Disk => store.history(&disk.name).map_or(0, |h| h.points.len()),
        _ => 0,
    }
}

/// After something with which a part of the histories of these disks may have ended: says whose have.
pub(crate) fn tell_of_histories(context: &Context, store: &Store, before: &[(Object, usize)]) {
    for (disk, before) in before {
        let after = points(store, disk);
        if *before > 1 && after < *before {
            context.ui.warn(format_args!(
                "the history of {0} begins anew: what it was at {1} earlier flushes is gone",
                disk.name,
                before - after
            ));
        }
    }
}

/// The state of something to be looked at, which changes nothing: of a disk that is attached for writing the one that a flush
/// just now made durable.
pub(crate) struct Looked<'a> {
    store: &'a Store,
    of: Of,
    /// May it have to be opened again?
    live: bool,
    state: State,
}

enum Of {
    Object(Object),
    Below(Below),
}

impl<'a> Looked<'a> {
    pub(crate) fn at(context: &Context, store: &'a Store, object: &Object) -> Result<Looked<'a>> {
        let owner = owner(context, store, object)?;
        if let Owner::Reader = owner {
            return Ok(Looked {
                store,
                of: Of::Object(store.resolve(&object.name)?),
                live: false,
                state: state_for_readers(store, &object.name)?,
            });
        }
        let live = matches!(owner, Owner::Writer(_));
        let mut object = object.clone();
        if let Owner::Writer(mut daemon) = owner {
            daemon.flush(&object.name)?;
            // A snapshot may have come in between: then the flush went to another layer.
            object = store.resolve(&object.name)?;
        }
        let of = Of::Object(object);
        let state = open(store, &of, live)?;
        Ok(Looked {
            store,
            of,
            live,
            state,
        })
    }
    pub(crate) fn below(store: &'a Store, below: Below) -> Result<Looked<'a>> {
        let of = Of::Below(below);
        let state = open(store, &of, false)?;
        Ok(Looked {
            store,
            of,
            live: false,
            state,
        })
    }
    pub(crate) fn state(&self) -> &State {
        &self.state
    }
    /// The object, as it was found.
    pub(crate) fn object(&self) -> Option<&Object> {
        match &self.of {
            Of::Object(object) => Some(object),
            Of::Below(_) => None,
        }
    }
    /// Is somebody writing to it?
    pub(crate) fn live(&self) -> bool {
        self.live
    }
    /// Opens it anew, as its last flush left it by now.
    pub(crate) fn again(&mut self) -> Result<()> {
        self.state = open(self.store, &self.of, self.live)?;
        Ok(())
    }
}

fn open(store: &Store, of: &Of, live: bool) -> Result<State> {
    match of {
        Of::Object(object) if live => store.live_state(object),
        Of::Object(object) => store.state(object),
        Of::Below(below) => store.state_of(*below),
    }
}

/// Looks, and again at what was opened anew if somebody who writes was in between.
pub(crate) fn look<T>(
    looked: &mut [&mut Looked<'_>],
    mut at: impl FnMut(&[&mut Looked<'_>]) -> Result<T>,
) -> Result<T> {
    let mut tries = 0;
    loop {
        match at(looked) {
            Err(e)
                if e.kind() == Kind::Corrupt
                    && tries < TRIES
                    && looked.iter().any(|l| l.live()) =>
            {
                tries += 1;
                for l in looked.iter_mut().filter(|l| l.live()) {
                    l.again()?;
                }
            }
            other => return other,
        }
    }
}
