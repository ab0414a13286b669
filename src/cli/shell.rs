//! For shells and readers: `completions`, `man`.

use crate::{
    cli::{Outcome, command, context::Context, store::counted},
    error::Error,
};
use clap::{Args, ValueHint};
use clap_complete::Shell;
use clap_mangen::{Man as Page, roff::Roff};
use serde_json::json;
use std::{
    io,
    path::{Path, PathBuf},
};

/// Print the completions for a shell
#[derive(Args, Debug)]
#[command(
    after_help = "bash: forkdisk completions bash > /usr/share/bash-completion/completions/forkdisk"
)]
pub(crate) struct Completions {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

impl Completions {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut command(), "forkdisk", &mut script);
        if context.ui.json {
            let script = String::from_utf8_lossy(&script);
            let shell = self.shell.to_string();
            return context
                .ui
                .document(json!({"shell": shell, "script": script}));
        }
        context.ui.data(script)
    }
}

/// Print the manual page, or write the page of every command
#[derive(Args, Debug)]
#[command(after_help = "To read it: forkdisk man | man -l -")]
pub(crate) struct Man {
    /// Write a page for each command into this directory
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        let mut main = command();
        main.build();
        let Some(dir) = self.dir else {
            let page = main_page(main).map_err(|e| Error::io("write", "the manual", &e))?;
            if ui.json {
                let page = String::from_utf8_lossy(&page);
                return ui.document(json!({"page": page}));
            }
            return ui.data(page);
        };
        let mut pages = vec![("forkdisk.1".to_string(), main_page(main.clone()))];
        sub_pages(&main, &mut pages);
        let files: Vec<PathBuf> = pages.iter().map(|(name, _)| dir.join(name)).collect();
        if !context.dry_run {
            std::fs::create_dir_all(&dir).map_err(|e| Error::io("create", &dir, &e))?;
            for ((_, page), file) in pages.into_iter().zip(&files) {
                let write = |file: &Path| std::fs::write(file, page?);
                write(file).map_err(|e| Error::io("write", file, &e))?;
            }
        }
        let number = counted(files.len(), "page");
        let would = if context.dry_run {
            "would write"
        } else {
            "wrote"
        };
        ui.talk(format_args!("{would} {number} to {}", dir.display()));
        if ui.json {
            return ui.document(json!({"files": files, "dry_run": context.dry_run}));
        }
        Ok(())
    }
}

/// The page of every command below `parent`: `forkdisk-daemon-run.1`.
fn sub_pages(parent: &clap::Command, pages: &mut Vec<(String, io::Result<Vec<u8>>)>) {
    let shown = |c: &&clap::Command| c.get_name() != "help" && !c.is_hide_set();
    for sub in parent.get_subcommands().filter(shown) {
        let name = sub.get_display_name().unwrap_or(sub.get_name()).to_string();
        let mut page = Vec::new();
        let written = Page::new(sub.clone()).render(&mut page).map(|()| page);
        pages.push((format!("{name}.1"), written));
        sub_pages(sub, pages);
    }
}

/// The page of `forkdisk` itself, with what holds for all commands.
fn main_page(main: clap::Command) -> io::Result<Vec<u8>> {
    const ENVIRONMENT: [(&str, &str); 4] = [
        ("FORKDISK_STORE", "the store, where -S names none"),
        (
            "FORKDISK_LOG",
            "a filter for the log: error, warn, info, debug, trace",
        ),
        (
            "FORKDISK_TRANSPORT",
            "how a daemon that is started gets its requests: device, io_uring",
        ),
        (
            "NO_COLOR",
            "if set and not empty: no colour unless --color always",
        ),
    ];
    const CODES: [(&str, &str); 12] = [
        ("0", "success"),
        ("1", "failure"),
        ("2", "usage: the command line or a value makes no sense"),
        ("3", "check: leaks found, nothing lost"),
        ("4", "corruption found"),
        ("5", "reserved: two things differ"),
        ("10", "there is no store"),
        ("11", "locked or in use"),
        ("12", "no such object"),
        ("13", "it exists already"),
        ("14", "no space left"),
        ("130", "interrupted"),
    ];
    const EXAMPLES: [(&str, &str); 4] = [
        ("forkdisk import debian.img", "take an image into the store"),
        (
            "forkdisk create web --from debian --count 3",
            "make web-1, web-2 and web-3 of it",
        ),
        ("dev=$(forkdisk attach web-1 --mount /mnt)", "use one"),
        (
            "forkdisk snapshot web-1@clean",
            "keep its state, mounted or not",
        ),
    ];
    let page = Page::new(main);
    let mut out = Vec::new();
    page.render_title(&mut out)?;
    page.render_name_section(&mut out)?;
    page.render_synopsis_section(&mut out)?;
    page.render_description_section(&mut out)?;
    page.render_options_section(&mut out)?;
    page.render_subcommands_section(&mut out)?;
    let mut more = Roff::default();
    for (title, entries) in [
        ("ENVIRONMENT", &ENVIRONMENT[..]),
        ("EXIT STATUS", &CODES[..]),
        ("EXAMPLES", &EXAMPLES[..]),
    ] {
        more.control("SH", [title]);
        for (term, meaning) in entries {
            more.control("TP", []);
            more.text([clap_mangen::roff::bold(*term)]);
            more.text([clap_mangen::roff::roman(*meaning)]);
        }
    }
    more.to_writer(&mut out)?;
    page.render_extra_section(&mut out)?;
    page.render_version_section(&mut out)?;
    Ok(out)
}
