//! Starting and stopping labs.
//!
//! Owns the checks before anything is built, and the process in the background that serves a lab.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    path::Path,
    process::{self, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use lab::{
    EnvKind, Lab, LabSpec, PodSpec, cgroupfs, enter,
    remote_control::{ControlServer, NewAgent},
    simulated_network::Routing,
    state,
    state::State,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, setsid},
};
use tokio::signal::unix::{SignalKind, signal};

use super::{NAMESPACE, ServeArguments, UpArguments, flag, lab_status};
use crate::{
    clients, ebpf, privilege,
    setup::{Build, Plan},
};

/// How long a lab takes to start once everything is built.
const UP_TAKES: Duration = Duration::from_secs(5);
/// How long a lab may take to go down.
const DOWN_TIMEOUT: Duration = Duration::from_mins(1);

/// Starts a lab in the background and returns when it is up.
pub(super) fn up(arguments: &UpArguments) -> anyhow::Result<()> {
    check(arguments)?;
    announce(arguments)?;
    let mut server = process::Command::new(enter::OWN_EXECUTABLE);
    server.args(["lab-serve", "--name", &arguments.name, "--imds", &flag(&arguments.imds)]);
    server.args(["--pods", &arguments.pods.to_string(), "--routing", &flag(&arguments.routing)]);
    if !arguments.no_agent {
        server.arg("--agent").arg(ebpf::build_agent()?);
    }
    start(&mut server, &arguments.name)?;
    lab_status::print_up(&State::load(&arguments.name)?);
    Ok(())
}

/// All that can be wrong with the arguments and the machine, before minutes go into a build.
fn check(arguments: &UpArguments) -> anyhow::Result<()> {
    let name = &arguments.name;
    state::check_name(name)?;
    privilege::require_root("a lab")?;
    let taken = State::list()?.into_iter().any(|lab| lab.name == *name && lab.is_alive());
    ensure!(!taken, "the lab {name} is up already: `cargo xtask lab down --name {name}`");
    cgroupfs::mount_point()?;
    Ok(())
}

/// Says what will be installed and built, and installs the packages.
fn announce(arguments: &UpArguments) -> anyhow::Result<()> {
    let mut plan = Plan::new(&format!("Starts the lab {}.", arguments.name), UP_TAKES);
    if matches!(arguments.routing, Routing::DefaultDenyEgress | Routing::DroppingInput) {
        plan = plan.needs(clients::missing_packet_filter());
    }
    if !arguments.no_agent {
        plan = plan.needs(ebpf::missing_tools()?).builds([Build::KernelPrograms, Build::Agent]);
    }
    plan.begin()
}

/// Starts the process in the background and waits until the lab is up.
fn start(server: &mut process::Command, name: &str) -> anyhow::Result<()> {
    let log = state::log_file(name)?;
    // Kept open: a lab that does not start removes its log.
    let mut log = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&log)
        .with_context(|| format!("cannot write {}", log.display()))?;
    let mut server = server
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone()?)
        .spawn()
        .context("cannot start the lab's process")?;
    let mut said = String::new();
    let stdout = server.stdout.take().context("BUG: the lab's output is not a pipe")?;
    BufReader::new(stdout).read_line(&mut said)?;
    if said.trim_end() != "ready" {
        server.wait()?;
        let mut text = String::new();
        log.seek(SeekFrom::Start(0))?;
        log.read_to_string(&mut text)?;
        bail!("the lab {name} did not start:\n{}", text.trim_end());
    }
    Ok(())
}

/// The process in the background. Says `ready` once and carries out commands until SIGTERM or SIGINT.
pub(crate) fn serve(arguments: &ServeArguments) -> anyhow::Result<()> {
    setsid().context("cannot leave the terminal's session")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let lab = Lab::up(LabSpec {
            served: true,
            routing: arguments.up.routing,
            ..LabSpec::new(&arguments.up.name, enter::OWN_EXECUTABLE)
        })?;
        let served = serve_lab(&lab, &arguments.up, arguments.agent.as_deref()).await;
        lab.down()?;
        served
    })
}

async fn serve_lab(lab: &Lab, up: &UpArguments, agent: Option<&Path>) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let flags = ["--imds", &flag(&up.imds), "--log-format", "text"];
    let mut control = ControlServer::bind(lab, &flags)?;
    for number in 1..=up.pods {
        let name = format!("app-{number}");
        let spec = PodSpec::new(NAMESPACE, &name).role(&format!("{name}-role"));
        // Every second one as the EKS webhook leaves it.
        let spec = if number % 2 == 0 {
            PodSpec { environment: EnvKind::Webhook, ..spec.with_token() }
        } else {
            spec
        };
        lab.add_pod(&spec)?;
    }
    if let Some(binary) = agent {
        control.start_agent(NewAgent { binary: Some(binary.to_owned()), flags: None }).await?;
    }
    println!("ready");
    std::io::stdout().flush()?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = control.run() => match ended? {},
    }
    control.stop_agent().await?;
    Ok(())
}

/// Stops the lab called `name`, or all that `lab up` started. What dead labs left behind is removed too.
pub(super) fn down(name: &str, all: bool) -> anyhow::Result<()> {
    privilege::require_root("removing a lab")?;
    let labs = State::list()?;
    let named = labs.iter().any(|lab| lab.name == name);
    let mut others = Vec::new();
    for lab in labs {
        if !lab.is_alive() {
            state::clean(&lab.name)?;
            println!("{} was dead; removed what it had left", lab.name);
        } else if lab.name == name || (all && lab.served) {
            stop(&lab)?;
            println!("{} is down", lab.name);
        } else {
            others.push(lab.name);
        }
    }
    let up = if others.is_empty() { "none is up".to_owned() } else { format!("up: {}", others.join(", ")) };
    ensure!(all || named, "there is no lab {name}; {up}");
    Ok(())
}

/// Asks the lab's process to take the lab down, and waits for it.
fn stop(lab: &State) -> anyhow::Result<()> {
    let pid = lab.owner.pid;
    ensure!(
        lab.served,
        "the lab {} belongs to a test or demo that runs as process {pid}: stop that",
        lab.name
    );
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM)
        .with_context(|| format!("cannot stop the lab {}, process {pid}", lab.name))?;
    let deadline = Instant::now() + DOWN_TIMEOUT;
    while lab.is_alive() {
        ensure!(
            Instant::now() < deadline,
            "the lab {} still runs as process {pid} after {DOWN_TIMEOUT:?}; its log is {}",
            lab.name,
            state::log_file(&lab.name)?.display()
        );
        sleep(Duration::from_millis(20));
    }
    // Nothing is left, unless the process could not remove it.
    state::clean(&lab.name)
}
