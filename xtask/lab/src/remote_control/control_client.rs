//! Asking a running lab.
//!
//! Owns one connection for each question.

use std::{
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
};

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::de::DeserializeOwned;

use super::{Reply, Request, socket};
use crate::state::{self, State};

/// Sends a command to the lab called `name` and waits until it is carried out. Blocks the thread.
pub fn ask<T: DeserializeOwned>(name: &str, request: &Request) -> anyhow::Result<T> {
    let lab = State::load(name)?;
    ensure!(lab.is_alive(), "the lab {name} is dead: `cargo xtask lab down --name {name}` removes it");
    let mut stream = match UnixStream::connect(socket(&state::directory(name))) {
        Ok(stream) => stream,
        Err(error) if error.kind() == io::ErrorKind::NotFound => bail!(
            "the lab {name} takes no commands: it is still starting, or a test or demo runs it as process {}",
            lab.owner.pid
        ),
        Err(error) => return Err(error).with_context(|| format!("cannot reach the lab {name}: run as root")),
    };
    let mut line = serde_json::to_string(request)?;
    line.push('\n');
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("cannot read the lab's answer")?;
    ensure!(!answer.is_empty(), "the lab {name} went down before it answered");
    match serde_json::from_str(&answer)
        .context("the lab's answer cannot be read; was it started by another build?")?
    {
        Reply::Ok(value) => Ok(serde_json::from_value(value)?),
        Reply::Error(error) => Err(anyhow!(error)),
    }
}
