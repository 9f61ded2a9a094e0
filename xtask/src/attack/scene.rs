//! Where an attack happens: a simulated node with the agent on it, its pods, and what the simulated AWS side knows.
//!
//! Owns the verdict on what an attacker holds: whose it is, by the records of who issued it. Never acts by itself.

mod lifecycle;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    sync::atomic::AtomicU32,
    time::Duration,
};

use anyhow::{Context as _, bail};
use lab::{AgentProcess, AgentSpec, EnvKind, Lab, NODE_ACCESS_KEY_ID, NODE_ROLE, Pod, PodSpec, enter};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    sync::Mutex,
    time::{Instant, sleep, timeout},
};

use super::{
    POD_IDENTITY, PROGRAM,
    attacker::{self, Act, Got},
    get,
    plan::{self, Build},
};

/// The namespace of pods that others are after, and of those that come after an attempt; but for its number.
const VICTIMS: &str = "shop";
const HONEST: &str = "honest";

/// Longer than any attacker takes.
const TIMEOUT: Duration = Duration::from_mins(2);
/// How long it may take until a pod is served for the first time, on an emulated machine too.
const SET_UP: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// An SDK waits no longer.
const SDK_MILLISECONDS: u64 = 1_000;

/// A node under attack: under one attempt after the other.
pub(super) struct Scene {
    pub(super) lab: Lab,
    /// The attempt's number, which is in the names of its namespaces and roles.
    number: u32,
    build: Build,
    spec: AgentSpec,
    /// The same of another ABI, as only the undefended build can be.
    other_abi: AgentSpec,
    agent: Mutex<Option<AgentProcess>>,
    successors: AtomicU32,
}

/// Where an attacker is.
#[derive(Clone, Copy)]
pub(super) enum Place<'a> {
    /// In a pod.
    In(&'a Pod),
    /// A process of the first pod in the second one's network.
    Through(&'a Pod, &'a Pod),
    /// In a pod's network, but in no pod.
    Beside(&'a Pod),
    /// On the node, in no pod.
    OnNode,
    /// In a pod that sees the node's files.
    WithNode(&'a Pod),
}

/// An attacker that stays until it is told to go on.
pub(super) struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// What came of an attack.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// What the attacker got, or did.
    pub(super) got: String,
    /// Whether it must not have.
    pub(super) is_harm: bool,
}

// === impl Outcome ===

impl Outcome {
    pub(super) fn harm(got: impl Into<String>) -> Self {
        Self { got: got.into(), is_harm: true }
    }

    pub(super) fn nothing(got: impl Into<String>) -> Self {
        Self { got: got.into(), is_harm: false }
    }

    /// The worst of several, of what is equally bad the first; and how many were harm.
    pub(super) fn worst(outcomes: Vec<Self>) -> Self {
        let (all, harm) = (outcomes.len(), outcomes.iter().filter(|outcome| outcome.is_harm).count());
        let worst = outcomes.into_iter().rev().max_by_key(|outcome| outcome.is_harm);
        let Self { got, is_harm } = worst.unwrap_or_else(|| Self::nothing("nothing was tried"));
        Self { got: format!("{got}; harm by {harm} of {all}"), is_harm }
    }

    /// The same with what the attacker says of it first.
    pub(super) fn after(self, said: &str) -> Self {
        Self { got: format!("{said}; {}", self.got), ..self }
    }
}

// === impl Scene ===

impl Scene {
    /// The pod that others are after, with a role of its own. It is served already: its credentials are cached, and its
    /// address is known.
    pub(super) async fn victim(&self) -> anyhow::Result<Pod> {
        let victim = self.lab.add_pod(&self.victim_spec())?;
        self.until_served(&victim).await?;
        Ok(victim)
    }

    /// The attacker's pod, with a role of its own.
    pub(super) fn attacker(&self) -> anyhow::Result<Pod> {
        self.lab.add_pod(&self.attacker_spec())
    }

    /// What the pod that others are after is like.
    pub(super) fn victim_spec(&self) -> PodSpec {
        self.pod_spec(VICTIMS, "victim")
    }

    /// What the attacker's pod is like.
    pub(super) fn attacker_spec(&self) -> PodSpec {
        self.pod_spec(plan::EVIL, "attacker")
    }

    /// What another pod of the attacker's is like.
    pub(super) fn tenant_spec(&self) -> PodSpec {
        self.pod_spec(plan::EVIL, "tenant")
    }

    /// A pod that this attempt alone knows: no other one has its namespace, its service account and its role.
    fn pod_spec(&self, namespace: &str, name: &str) -> PodSpec {
        let role = format!("{name}-role-{}", self.number);
        PodSpec::new(&plan::namespace(namespace, self.number), name).role(&role)
    }

    /// A file that pods on this node share, as by a hostPath.
    pub(super) fn shared_file(&self, name: &str) -> PathBuf {
        let lab = self.lab.node.place.directory.file_name().unwrap_or_default();
        std::env::temp_dir().join(format!("podgate-{}-{}-{name}", lab.display(), self.number))
    }

    /// Lets an attacker do something to its end.
    pub(super) async fn act(&self, place: Place<'_>, act: &Act) -> anyhow::Result<Got> {
        let mut running = self.spawn(place, act)?;
        let line = running.line().await?;
        serde_json::from_str(&line).with_context(|| format!("an attacker printed {line:?}"))
    }

    /// Lets an attacker do something until it stays; what it got if it does not.
    pub(super) async fn begin(&self, place: Place<'_>, act: &Act) -> anyhow::Result<Result<Running, Got>> {
        let mut running = self.spawn(place, act)?;
        match running.line().await? {
            line if line == attacker::READY => Ok(Ok(running)),
            line => Ok(Err(serde_json::from_str(&line)?)),
        }
    }

    /// The same for what must stay.
    pub(super) async fn must_begin(&self, place: Place<'_>, act: &Act) -> anyhow::Result<Running> {
        match self.begin(place, act).await? {
            Ok(running) => Ok(running),
            Err(got) => bail!("an attacker could not begin: {got:?}"),
        }
    }

    fn spawn(&self, place: Place<'_>, act: &Act) -> anyhow::Result<Running> {
        let act = serde_json::to_string(act)?;
        let command = [enter::OWN_EXECUTABLE, attacker::SUBCOMMAND, &act];
        let command = match place {
            Place::In(pod) => self.lab.exec(pod, EnvKind::None, &command),
            Place::Through(pod, network_of) => self.lab.exec_through(pod, network_of, &command),
            Place::Beside(pod) => self.lab.exec_outside(pod, &command),
            Place::OnNode => self.lab.on_node(&command),
            Place::WithNode(pod) => self.lab.exec_with_node(pod, &command),
        };
        Running::spawn(command?)
    }

    /// Whose the access keys are that an attacker holds, if it holds some: the worst of it. `own` is the pod whose keys it
    /// may.
    pub(super) fn loot(&self, got: &Got, own: Option<&Pod>) -> Outcome {
        let whose = got.access_keys().into_iter().map(|key| self.whose(key, own));
        let worst = whose.max_by_key(|outcome| outcome.is_harm);
        worst.unwrap_or_else(|| Outcome::nothing(got.refusal()))
    }

    fn whose(&self, key: &str, own: Option<&Pod>) -> Outcome {
        if key == NODE_ACCESS_KEY_ID {
            return Outcome::harm(format!("the node's role, {NODE_ROLE}"));
        }
        match self.lab.eks_auth.issued(key) {
            None => Outcome::harm(format!("the access key {key}, which nobody has issued")),
            Some(issued) if own.is_some_and(|own| own.uid == issued.pod_uid) => {
                Outcome::nothing("its own role")
            }
            Some(issued) => {
                Outcome::harm(format!("the role of {}/{}", issued.namespace, issued.service_account))
            }
        }
    }

    /// Waits until a pod is served: the agent hears of pods, and first asks EKS Auth, in its own time.
    pub(super) async fn until_served(&self, pod: &Pod) -> anyhow::Result<()> {
        let deadline = Instant::now() + SET_UP;
        while let Err(why) = self.is_served(pod).await? {
            if Instant::now() > deadline {
                bail!("{} is not served: {why}", pod.full_name());
            }
            sleep(RETRY_DELAY).await;
        }
        Ok(())
    }

    /// Waits until the agent knows a pod's policy.
    pub(super) async fn until_known(&self, pod: &Pod) -> anyhow::Result<()> {
        let deadline = Instant::now() + SET_UP;
        let whois = format!("/whois/{}", pod.sandbox.pid);
        loop {
            let answer = self.lab.node.ask_agent(&whois).await?;
            if answer.status == 200 && answer.body.contains(&pod.name) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} is not known: {}", pod.full_name(), answer.body);
            }
            sleep(RETRY_DELAY).await;
        }
    }

    /// Whether a pod that has done nothing is served as usual, in the time that SDKs allow.
    pub(super) async fn is_served(&self, pod: &Pod) -> anyhow::Result<Result<(), String>> {
        let request = get(POD_IDENTITY.ip(), PROGRAM, "");
        let got = self.act(Place::In(pod), &ask(POD_IDENTITY, &request)).await?;
        let key = got.access_keys().pop_first().and_then(|key| self.lab.eks_auth.issued(key));
        Ok(match key {
            Some(issued) if issued.pod_uid != pod.uid => Err("another pod's role".to_owned()),
            Some(_) if got.milliseconds > SDK_MILLISECONDS => Err(format!("{} ms", got.milliseconds)),
            Some(_) => Ok(()),
            None => Err(got.refusal()),
        })
    }

    /// Whether a victim has noticed anything.
    pub(super) async fn unharmed(&self, victim: &Pod) -> anyhow::Result<Outcome> {
        let mut served = self.is_served(victim).await?;
        if served.is_err() {
            // SDKs ask again.
            served = self.is_served(victim).await?;
        }
        Ok(match served {
            Ok(()) => Outcome::nothing("another pod is served as usual"),
            Err(why) => Outcome::harm(format!("another pod gets {why}")),
        })
    }
}

// === impl Running ===

impl Running {
    fn spawn(mut command: Command) -> anyhow::Result<Self> {
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start an attacker")?;
        let stdout = child.stdout.take().context("BUG: the attacker's output is not a pipe")?;
        Ok(Self { child, lines: BufReader::new(stdout).lines() })
    }

    /// Lets it go on to its end.
    pub(super) async fn finish(mut self) -> anyhow::Result<Got> {
        if let Some(mut stdin) = self.child.stdin.take() {
            // One that has ended by itself takes no more.
            let _ = stdin.write_all(b"\n").await;
        }
        let line = self.line().await?;
        serde_json::from_str(&line).with_context(|| format!("an attacker printed {line:?}"))
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let line = timeout(TIMEOUT, self.lines.next_line()).await.context("an attacker hangs")??;
        let Some(line) = line else {
            let stderr = self.child.stderr.take().context("BUG: the attacker's errors are not a pipe")?;
            let mut errors = BufReader::new(stderr).lines();
            let first = errors.next_line().await?.unwrap_or_default();
            bail!("an attacker could not do what it was to: {first}");
        };
        Ok(line)
    }
}

/// A pod on the host's network with this annotation.
pub(super) fn on_host_network(spec: PodSpec, annotation: (&str, &str)) -> PodSpec {
    PodSpec { host_network: true, ..spec.annotation(annotation.0, annotation.1) }
}

/// One request on a connection of its own.
pub(super) fn ask(to: SocketAddr, request: &str) -> Act {
    Act::Ask { route: to.into(), request: request.to_owned() }
}

/// The IPv4 address of a pod.
pub(super) fn address(pod: &Pod) -> anyhow::Result<Ipv4Addr> {
    pod.addresses.v4.context("BUG: the lab's pods have IPv4 addresses")
}

/// Where HTTP is served at this address.
pub(super) const fn http(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, 80)
}
