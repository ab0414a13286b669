//! Images in and out: `import`, `export`.

use crate::{
    cli::{
        Outcome, Stop, context::Context, names::Names, render::json::ObjectDoc, states::settled,
    },
    convert::{self, qcow2, raw, stream},
    error::{Error, Kind, Result},
    format::stream::Digest,
    store::{
        Calls, Effort, ImportMode, ImportSource, Object, ObjectKind, State, Store, StreamTotals,
    },
    sys::signals,
};
use clap::{Args, ValueEnum, ValueHint};
use serde::Serialize;
use serde_json::json;
use std::{
    fs::File,
    io::{self, BufReader, Cursor, IsTerminal, Read},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

/// Take a raw or qcow2 image into the store, as a base that disks are forked from, or a stream of another store
#[derive(Args, Debug)]
#[command(
    after_help = "A raw image is reflinked where the filesystem can, else copied; holes stay holes. A qcow2 image (-O qcow2) is copied; it\n\
        must be a file that is complete in itself: no other file that it names is looked at.\n\
        A stream of everything becomes a base; what changed since a state becomes an image over that state, which must be in the store."
)]
pub(crate) struct Import {
    /// The image file, or - for standard input
    #[arg(value_name = "SRC", value_hint = ValueHint::FilePath)]
    source: PathBuf,
    /// What to call it [default: the file's name without its ending]
    name: Option<String>,
    /// Share the file's blocks, or fail
    #[arg(long, group = "how")]
    reflink: bool,
    /// Copy the file
    #[arg(long, group = "how")]
    copy: bool,
    /// Leave the file where it is; it must not change any more
    #[arg(long, group = "how")]
    link: bool,
    /// What the file is, whatever its first bytes look like
    #[arg(short = 'O', long, value_name = "FORMAT")]
    format: Option<ImportFormat>,
}

/// A format whose name was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ImportFormat {
    /// Every byte is the disk's
    Raw,
    /// A qcow2 image, complete in one file
    Qcow2,
    /// A stream that `export` wrote
    Stream,
}

impl Import {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let stdin = self.source == Path::new("-");
        let mode = self.mode();
        let name = match (&self.name, stdin) {
            (Some(name), _) => name.clone(),
            (None, false) => stem(&self.source)?,
            (None, true) => {
                return Err(
                    Error::new(Kind::Invalid, "an image from standard input needs a name")
                        .hint("`forkdisk import - NAME`")
                        .into(),
                );
            }
        };
        if stdin {
            if io::stdin().is_terminal() {
                return Err(Error::new(Kind::Invalid, "standard input is a terminal")
                    .hint("`zcat disk.img.gz | forkdisk import - NAME`")
                    .into());
            }
            if matches!(mode, ImportMode::Reflink | ImportMode::Link) {
                return Err(Error::new(
                    Kind::Invalid,
                    "standard input can only be copied, not shared or linked",
                )
                .hint("leave out --reflink and --link")
                .into());
            }
        }
        let image = self.qcow2()?;
        if context.dry_run {
            return self.pretend(context, &name);
        }
        signals::catch();
        let mut reader = Stdin(io::stdin().lock());
        let mut start = Vec::new();
        if stdin && self.format.is_none() {
            let begun = (&mut reader).take(8).read_to_end(&mut start);
            begun.map_err(|e| Error::io("read", "standard input", &e))?;
            if let Some(foreign) = convert::sniff(&start) {
                return Err(convert::not_raw(None, foreign).into());
            }
        }
        let mut reader = Cursor::new(&start).chain(reader);
        let is_stream = match self.format {
            Some(format) => format == ImportFormat::Stream,
            None if stdin => stream::is_stream(&start),
            None => image.is_none() && stream::looks_like_stream(&self.source),
        };
        if is_stream && mode != ImportMode::Auto && mode != ImportMode::Copy {
            return Err(only_copied("a stream").into());
        }
        let store = context.open_or_init()?;
        let progress = ui.progress(&format!("importing {name}"));
        let object = match (is_stream, stdin) {
            (true, true) => store.import_stream(&mut reader, &name, &*progress),
            (true, false) => {
                let file = File::open(&self.source);
                let file = file.map_err(|e| Error::io("open", &self.source, &e))?;
                let mut reader = BufReader::with_capacity(1 << 20, file);
                store.import_stream(&mut reader, &name, &*progress)
            }
            (false, stdin) => {
                let source = match (&image, stdin) {
                    (Some(image), _) => ImportSource::Content(image),
                    (None, true) => ImportSource::Reader(&mut reader),
                    (None, false) => ImportSource::Path(&self.source),
                };
                store.import(source, &name, mode, &*progress)
            }
        };
        drop(progress);
        let object = object.map_err(|e| match e.kind() {
            Kind::NotFound => {
                e.or_hint("SRC is the path of an image file, or - for standard input")
            }
            _ => e,
        })?;
        if ui.json {
            return ui.document(ObjectDoc::new(&object, &Names::default()));
        }
        ui.talk(format_args!(
            "imported {}, {}",
            object.name,
            ui.size(object.size)
        ));
        Ok(())
    }
    /// The qcow2 image that the source is said to be. What is plainly not raw has to be called what it is: a guest decides what its disk begins with.
    fn qcow2(&self) -> Result<Option<qcow2::image::Image>> {
        let stdin = self.source == Path::new("-");
        match self.format {
            None if !stdin => match convert::sniff_file(&self.source) {
                Some(foreign) => return Err(convert::not_raw(Some(&self.source), foreign)),
                None => return Ok(None),
            },
            Some(ImportFormat::Qcow2) => {}
            _ => return Ok(None),
        }
        if stdin {
            return Err(Error::new(
                Kind::Invalid,
                "a qcow2 image cannot be read from standard input: its tables may be anywhere",
            )
            .hint("save it to a file, and name that"));
        }
        if matches!(self.mode(), ImportMode::Reflink | ImportMode::Link) {
            return Err(only_copied("a qcow2 image"));
        }
        qcow2::image::Image::open(&self.source).map(Some)
    }
    fn mode(&self) -> ImportMode {
        match (self.reflink, self.copy, self.link) {
            (true, ..) => ImportMode::Reflink,
            (_, true, _) => ImportMode::Copy,
            (.., true) => ImportMode::Link,
            _ => ImportMode::Auto,
        }
    }
    fn pretend(&self, context: &Context, name: &str) -> Outcome {
        match context.open() {
            Ok(store) => context.must_be_free(&store, name)?,
            Err(e) if e.kind() == Kind::NoStore => {}
            Err(e) => return Err(e.into()),
        }
        if self.source != Path::new("-") {
            File::open(&self.source).map_err(|e| Error::io("read", &self.source, &e))?;
        }
        let document = json!({"dry_run": true, "name": name, "source": self.source});
        context.ui.answer(document, || {
            format!("would import {} as {name}\n", self.source.display())
        })
    }
}

fn only_copied(what: &str) -> Error {
    Error::new(Kind::Invalid, format!("{what} can only be copied"))
        .hint("leave out --reflink and --link; `--format raw` takes the file as a raw image")
}

/// The file's name without its last ending.
fn stem(path: &Path) -> Result<String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str());
    stem.map(str::to_string).ok_or_else(|| {
        let shown = path.display();
        Error::new(
            Kind::Invalid,
            format!("{shown} gives no name for the image"),
        )
        .hint(format!("name it: `forkdisk import {shown} NAME`"))
    })
}

/// Standard input that a signal ends.
struct Stdin<R>(R);

impl<R: Read> Read for Stdin<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            if signals::caught() {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
            match self.0.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

/// Formats of exported files.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Format {
    /// The bytes of the disk
    Raw,
    /// A QEMU image
    Qcow2,
    /// A stream for another store
    Stream,
}

impl Format {
    fn word(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Stream => "stream",
        }
    }
}

/// Write a disk, snapshot or image into a file
#[derive(Args, Debug)]
#[command(
    after_help = "A raw file is sparse. A file appears under its name only when it is complete.\n\
        A stream holds everything, or with --since what changed, and checksums; `forkdisk import` takes it."
)]
pub(crate) struct Export {
    /// What to write
    #[arg(value_name = "REF")]
    reference: String,
    /// The new file, or - for standard output
    #[arg(value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// The file's format [default: raw, or stream with --since]
    #[arg(short = 'O', long, value_name = "FORMAT", value_enum)]
    format: Option<Format>,
    /// Write only what changed since this snapshot, image or base
    #[arg(long, value_name = "SNAP")]
    since: Option<String>,
    /// Replace a file that is there
    #[arg(short, long)]
    force: bool,
}

#[derive(Serialize)]
struct ExportDoc<'a> {
    dry_run: bool,
    #[serde(flatten)]
    object: ObjectDoc,
    file: &'a Path,
    format: &'static str,
    since: Option<&'a str>,
    written: u64,
    /// Of a stream: its SHA-256.
    digest: Option<String>,
}

impl Export {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let stdout = self.file == Path::new("-");
        let format = self.format()?;
        let store = context.open_to_change()?;
        let object = store.resolve_any(&self.reference)?;
        if stdout {
            if ui.json && !context.dry_run {
                return Err(Error::new(
                    Kind::Invalid,
                    "standard output cannot carry the image and a JSON document",
                )
                .hint("export to a file, or leave out --json")
                .into());
            }
            if io::stdout().is_terminal() && !context.dry_run {
                return Err(Error::new(Kind::Invalid, "standard output is a terminal")
                    .hint("`forkdisk export REF - | gzip > disk.img.gz`")
                    .into());
            }
        } else {
            raw::check_target(&self.file, self.force)?;
        }
        // A base is written as long as it came in, which may be no multiple of the block size.
        let len = match object.kind {
            ObjectKind::Base => store.details(&object)?.base.len,
            _ => object.size,
        };
        let since = self
            .since
            .as_ref()
            .map(|since| sealed(&store, since))
            .transpose()?;
        if context.dry_run {
            return self.answer(context, &store, &object, format, 0, None);
        }
        signals::catch();
        let since = match since {
            None => None,
            Some(since) => {
                let progress = ui.progress(&format!("computing the digest of {}", since.name));
                let digest = store.digest(&since, Effort::ANY, &*progress)?;
                let state = store.state(&since)?;
                digest.map(|digest| (since, state, digest))
            }
        };
        let calls = match format {
            Format::Stream => self.calls(context, &store, &object, &since)?,
            _ => Calls::Nothing,
        };
        let over = since.as_ref().map(|(since, _, digest)| (since, *digest));
        let keep = |totals: &StreamTotals| {
            if let (Calls::ByItself, Some(over)) = (calls, over) {
                store.keep_digest(&object, over, totals.digest);
            }
        };
        let known_as = calls.digest();
        let since = since.as_ref().map(|(_, state, digest)| (state, *digest));
        let state = settled(context, &store, &object)?;
        let progress = ui.progress(&format!("exporting {}", object.name));
        if !stdout && format == Format::Stream {
            let totals =
                stream::export_file(&state, since, known_as, &self.file, self.force, &*progress)?;
            drop(progress);
            keep(&totals);
            let digest = Some(totals.digest.to_string());
            return self.answer(context, &store, &object, format, totals.data, digest);
        }
        let disk = state.disk();
        // It may have got another size since it was looked up.
        let len = match object.kind {
            ObjectKind::Base => len,
            _ => state.size(),
        };
        if !stdout {
            let export = match format {
                Format::Qcow2 => qcow2::export_file,
                _ => raw::export_file,
            };
            let written = export(disk, len, &self.file, self.force, &*progress)?;
            drop(progress);
            return self.answer(context, &store, &object, format, written, None);
        }
        let out = io::stdout().as_fd().try_clone_to_owned();
        let mut out = File::from(out.map_err(|e| Stop::output(&e))?);
        let sent = match format {
            Format::Stream => {
                let sent = stream::export_to(&state, since, known_as, &mut out, &*progress)?;
                sent.map(|totals| keep(&totals))
            }
            Format::Qcow2 => qcow2::export_stream(disk, len, &mut out, &*progress)?,
            Format::Raw => raw::export_stream(disk, len, &mut out, &*progress)?,
        };
        drop(progress);
        match sent.map_err(|e| Stop::output(&e)) {
            // Nothing to say, but the stream is not whole.
            Err(Stop::Pipe) => Err(Stop::Code(1)),
            other => other,
        }
    }
    /// What a stream says of the digest of what it holds. What is damaged below it is no reason not to write it.
    fn calls(
        &self,
        context: &Context,
        store: &Store,
        object: &Object,
        since: &Option<(Object, State, Digest)>,
    ) -> Result<Calls> {
        let ui = &context.ui;
        let name = &object.name;
        let over = since.as_ref().map(|(since, _, digest)| (since, *digest));
        let progress = ui.progress(&format!("computing the digest of {name}"));
        let calls = store.calls(object, over, Effort::USUAL, &*progress);
        drop(progress);
        let why = match calls {
            Err(e) if e.kind() == Kind::Interrupted => return Err(e),
            Ok(Calls::Unknown) => "its base is larger than 16 GiB, and has no digest".to_string(),
            Ok(calls) => return Ok(calls),
            Err(e) => e.to_string(),
        };
        ui.warn(format_args!(
            "the digest of {name} is not known: nothing that is exported --since {name} can be applied to what becomes of this ({why})"
        ));
        Ok(Calls::Unknown)
    }
    /// What is to be written.
    fn format(&self) -> Result<Format> {
        match (self.format, &self.since) {
            (None, None) => Ok(Format::Raw),
            (None, Some(_)) => Ok(Format::Stream),
            (Some(image @ (Format::Raw | Format::Qcow2)), Some(_)) => Err(Error::new(
                Kind::Invalid,
                format!(
                    "a {} image is no difference, so there is nothing it could be since",
                    image.word()
                ),
            )
            .hint(format!("leave out `-O {}`, or --since", image.word()))),
            (Some(format), _) => Ok(format),
        }
    }
    fn answer(
        &self,
        context: &Context,
        store: &Store,
        object: &Object,
        format: Format,
        written: u64,
        digest: Option<String>,
    ) -> Outcome {
        let ui = &context.ui;
        let file = self.file.display();
        if ui.json {
            return ui.document(ExportDoc {
                dry_run: context.dry_run,
                object: ObjectDoc::new(object, &Names::of(store)?),
                file: &self.file,
                format: format.word(),
                since: self.since.as_deref(),
                written,
                digest,
            });
        }
        if context.dry_run {
            return ui.data(format!("would export {} to {file}\n", object.name));
        }
        ui.talk(format_args!(
            "exported {} to {file}, {} with {} of {}data",
            object.name,
            ui.size(object.size),
            ui.size(written),
            if self.since.is_some() { "changed " } else { "" }
        ));
        Ok(())
    }
}

/// What stays as it is, so that something can be told to have changed since.
fn sealed(store: &Store, reference: &str) -> Result<Object> {
    let object = store.resolve(reference)?;
    match object.kind {
        ObjectKind::Disk => Err(Error::new(
            Kind::Invalid,
            format!("{} is a disk, and changes", object.name),
        )
        .hint("name a snapshot, an image or a base after --since")),
        _ => Ok(object),
    }
}
