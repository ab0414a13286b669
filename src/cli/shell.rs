//! For shells and readers: `completions`, `man`.

use crate::{
    cli::{Cli, Outcome, command, context::Context, examples, store::counted},
    error::Error,
};
use clap::{Args, CommandFactory, ValueHint};
use clap_complete::Shell;
use clap_mangen::{Man as Page, roff::Roff};
use serde_json::json;
use std::{
    io,
    path::{Path, PathBuf},
};

/// Print the completions for a shell
#[derive(Args, Debug)]
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
pub(crate) struct Man {
    /// Write a page for each command into this directory
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    dir: Option<PathBuf>,
}

impl Man {
    pub(crate) fn run(self, context: &Context) -> Outcome {
        let ui = &context.ui;
        // Without the examples, which have a section of their own.
        let mut main = Cli::command();
        main.build();
        let Some(dir) = self.dir else {
            let page = main_page(&main).map_err(|e| Error::io("write", "the manual", &e))?;
            if ui.json {
                let page = String::from_utf8_lossy(&page);
                return ui.document(json!({"page": page}));
            }
            return ui.data(page);
        };
        let mut pages = vec![("forkdisk.1".to_string(), main_page(&main))];
        sub_pages(&main, "", &mut pages);
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
fn sub_pages(parent: &clap::Command, path: &str, pages: &mut Vec<(String, io::Result<Vec<u8>>)>) {
    let shown = |c: &&clap::Command| c.get_name() != "help" && !c.is_hide_set();
    for sub in parent.get_subcommands().filter(shown) {
        let name = sub.get_display_name().unwrap_or(sub.get_name()).to_string();
        let path = examples::below(path, sub);
        pages.push((format!("{name}.1"), page(sub, &[], examples::of(&path))));
        sub_pages(sub, &path, pages);
    }
}

/// Terms and what they mean.
type Terms = &'static [(&'static str, &'static str)];

/// A page, with sections of terms.
fn page(
    command: &clap::Command,
    sections: &[(&str, Terms)],
    examples: Terms,
) -> io::Result<Vec<u8>> {
    let page = Page::new(command.clone());
    let mut out = Vec::new();
    page.render_title(&mut out)?;
    page.render_name_section(&mut out)?;
    page.render_synopsis_section(&mut out)?;
    page.render_description_section(&mut out)?;
    page.render_options_section(&mut out)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut out)?;
    }
    if command.get_after_help().is_some() {
        page.render_extra_section(&mut out)?;
    }
    let mut more = Roff::default();
    for (title, terms) in sections.iter().chain(&[("EXAMPLES", examples)]) {
        more.control("SH", [*title]);
        for (term, meaning) in *terms {
            more.control("TP", []);
            more.text([clap_mangen::roff::bold(*term)]);
            more.text([clap_mangen::roff::roman(*meaning)]);
        }
    }
    more.to_writer(&mut out)?;
    if command.get_version().is_some() {
        page.render_version_section(&mut out)?;
    }
    Ok(out)
}

/// The page of `forkdisk` itself, with what holds for all commands.
fn main_page(main: &clap::Command) -> io::Result<Vec<u8>> {
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
        ("5", "diff --exit-code: the two differ"),
        ("10", "there is no store"),
        ("11", "locked or in use"),
        ("12", "no such object"),
        ("13", "it exists already"),
        ("14", "no space left"),
        ("130", "interrupted"),
    ];
    let sections: [(&str, Terms); 2] = [("ENVIRONMENT", &ENVIRONMENT), ("EXIT STATUS", &CODES)];
    page(main, &sections, examples::of(""))
}
