//! What layers an object stands on: `squash`, `flatten`.

use crate::{
    cli::{
        Outcome,
        context::Context,
        states::{histories_in, tell_of_histories, with_points},
        store::counted,
    },
    daemon::Client,
    error::Result,
    store::{Below, ObjectKind, Store},
    sys::signals,
};
use clap::Args;
use serde::Serialize;

/// Join the layers that an object stands on into one
#[derive(Args, Debug)]
#[command(
    after_help = "Of a disk the sealed layers below its own are joined, of a snapshot or image its own and those below: down to the next \
        image, or the base. Nothing that anyone sees changes; disks can be attached and busy meanwhile. Layers that other names \
        need stay for these; what the layers kept of the history of a disk ends. An interrupted squash goes on where it stopped when it is run again."
)]
pub(crate) struct Squash {
    /// A disk, snapshot or image
    #[arg(value_name = "REF")]
    reference: String,
    /// Do not stop at images, or at the histories of other disks: down to the base
    #[arg(long)]
    all: bool,
}

#[derive(Serialize)]
struct SquashDoc {
    dry_run: bool,
    name: String,
    layers: u32,
    bytes: u64,
    needs: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    copied: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    freed: Option<u64>,
    depth_before: u32,
    depth_after: u32,
}

impl Squash {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let plan = store.plan_squash(&self.reference, self.all)?;
        let (name, layers) = (plan.name.clone(), plan.layers);
        let mut document = SquashDoc {
            dry_run: context.dry_run,
            name: name.clone(),
            layers,
            bytes: plan.bytes,
            needs: plan.needs,
            copied: None,
            freed: None,
            depth_before: plan.depth,
            depth_after: plan.depth_after,
        };
        let needs = ui.size(plan.needs);
        let what = counted(layers as usize, "layer");
        if layers < 2 {
            (document.bytes, document.needs) = (0, 0);
            let border = plan.border.map_or(String::new(), |disk| {
                format!("; below is the history of {disk}, which `--all` would end")
            });
            let nothing = format!("{name} has nothing to squash: {what}{border}");
            if context.dry_run || ui.json {
                return ui.answer(document, || nothing + "\n");
            }
            ui.talk(nothing);
            return Ok(());
        }
        store.may_squash(&plan)?;
        if context.dry_run {
            return ui.answer(document, || {
                format!("would squash {what} under {name} into one; needs up to {needs}\n")
            });
        }
        ui.talk(format_args!(
            "squashing {what} under {name}; needs up to {needs}"
        ));
        signals::catch();
        let progress = ui.progress(&format!("squashing {name}"));
        let histories = histories_in(&store, &plan.members())?;
        let done = store.squash(plan, &*progress)?;
        drop(progress);
        let freed = done.replaced + settle(context, &store, &done.former)?;
        tell_of_histories(context, &store, &histories);
        (document.copied, document.freed) = (Some(done.copied), Some(freed));
        if ui.json {
            return ui.document(document);
        }
        ui.talk(format_args!(
            "squashed {what} under {name}: copied {}, freed {}",
            ui.size(done.copied),
            ui.size(freed)
        ));
        Ok(())
    }
}

/// Make a disk, snapshot or image independent of all it stands on
#[derive(Args, Debug)]
#[command(
    after_help = "Its whole content becomes a base of its own, without a name. Nothing that anyone sees changes; a disk can be attached and \
        busy meanwhile. An interrupted flatten goes on where it stopped when it is run again, with what was written since."
)]
pub(crate) struct Flatten {
    /// A disk, snapshot or committed image
    #[arg(value_name = "REF")]
    reference: String,
}

#[derive(Serialize)]
struct FlattenDoc {
    dry_run: bool,
    name: String,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    copied: Option<u64>,
    base_id: Option<String>,
    digest: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    freed: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    depth_before: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    depth_after: Option<u32>,
}

impl Flatten {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let store = context.open()?;
        let object = store.resolve(&self.reference)?;
        let name = object.name.clone();
        let bytes = store.plan_flatten(&object)?;
        let mut document = FlattenDoc {
            dry_run: context.dry_run,
            name: name.clone(),
            bytes,
            copied: None,
            base_id: None,
            digest: None,
            freed: None,
            depth_before: None,
            depth_after: None,
        };
        let needs = ui.size(bytes);
        if context.dry_run {
            return ui.answer(document, || {
                format!("would flatten {name}; needs up to {needs}\n")
            });
        }
        ui.talk(format_args!("flattening {name}; needs up to {needs}"));
        signals::catch();
        let depth = store.details(&object)?.depth;
        // That of a disk ends with what is sealed for it.
        let mut histories = with_points(&store, vec![object.clone()]);
        if object.kind == ObjectKind::Disk {
            match context.daemon_of(&store, &name)? {
                Some((mut daemon, _)) => daemon.seal(&name)?,
                None => store.seal(&name)?,
            };
        }
        let progress = ui.progress(&format!("flattening {name}"));
        let object = store.resolve(&name)?;
        let replaced = match object.parent {
            Some(below) if object.kind == ObjectKind::Disk => below,
            _ => Below::Layer(object.id),
        };
        let others = histories_in(&store, &[replaced])?;
        histories.extend(others.into_iter().filter(|(disk, _)| disk.name != name));
        let done = store.flatten(&name, &*progress).inspect_err(|_| {
            // What is sealed stays sealed.
            tell_of_histories(context, &store, &histories);
        })?;
        drop(progress);
        let freed = done.replaced + settle(context, &store, &done.former)?;
        tell_of_histories(context, &store, &histories);
        document.bytes = done.bytes;
        document.copied = done.base.map(|_| done.copied);
        document.base_id = done.base.map(|id| id.to_string());
        document.digest = done.digest;
        document.freed = Some(freed);
        document.depth_before = Some(depth);
        document.depth_after = Some(done.depth_after);
        if ui.json {
            return ui.document(document);
        }
        match done.base {
            None => ui.talk(format_args!("{name} stands on a base of its own already")),
            Some(_) => ui.talk(format_args!(
                "flattened {name}: copied {}, freed {}",
                ui.size(done.copied),
                ui.size(freed)
            )),
        }
        Ok(())
    }
}

/// After files of layers were replaced: attached disks read through the new ones, and what nobody needs any more goes.
fn settle(context: &Context, store: &Store, former: &[Below]) -> Result<u64> {
    let told = match Client::connect(store) {
        Ok(Some(mut daemon)) => daemon.rechain().map(|_| ()),
        Ok(None) => Ok(()),
        Err(e) => Err(e),
    };
    if let Err(e) = told {
        // They go on with the files that they have open, which show the same.
        context.ui.warn(format_args!(
            "attached disks still have the former files open, which `forkdisk gc` removes after they are detached: {e}"
        ));
    }
    store.collect_former(former)
}
