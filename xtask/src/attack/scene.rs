//! Where an attack happens: a simulated node with the agent on it, its pods, and what the simulated AWS side knows.
//!
//! Owns the verdict on what an attacker holds: whose it is, by the records of who issued it. Never acts by itself.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, bail};
use lab::{
    AgentProcess, AgentSpec, EnvKind, Lab, LabSpec, NODE_ACCESS_KEY_ID, NODE_ROLE, Pod, PodSpec, enter,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    sync::Mutex,
    time::{Instant, sleep, timeout},
};

use super::{
    Builds, POD_IDENTITY, PROGRAM, Without,
    attacker::{self, Act, Got},
    get,
};

/// The environment of `podgate-undefended` that switches defenses off.
const WITHOUT: &str = "PODGATE_WITHOUT";
/// Pods are kept from the node's role.
const FLAGS: [&str; 2] = ["--imds", "intercept"];
/// Longer than any attacker takes.
const TIMEOUT: Duration = Duration::from_mins(2);
/// How long it may take until a pod is served for the first time, on an emulated machine too.
const SET_UP: Duration = Duration::from_secs(30);
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// An SDK waits no longer.
const SDK_MILLISECONDS: u64 = 1_000;

/// A node under attack.
pub(super) struct Scene {
    pub(super) lab: Lab,
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

    /// The same with what the attacker says of it first.
    pub(super) fn after(self, said: &str) -> Self {
        Self { got: format!("{said}; {}", self.got), ..self }
    }
}

// === impl Scene ===

impl Scene {
    /// A node without an agent yet, which will be without these defenses.
    pub(super) fn up(builds: &Builds, without: &[Without]) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("attack-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let lab = Lab::up(LabSpec::new(&name, enter::OWN_EXECUTABLE))?;
        let (mut switched_off, mut flags) = (Vec::new(), FLAGS.to_vec());
        for without in without {
            match *without {
                Without::Defense(defense) => switched_off.push(defense.label()),
                Without::Flags(flag, value) => flags.extend([flag, value]),
                Without::Annotation(key, value) => {
                    let annotations = [(key.to_owned(), value.to_owned())].into();
                    lab.cluster.add_namespace(&attacker().namespace, annotations);
                }
            }
        }
        let mut other_abi = AgentSpec::new(&builds.undefended, &flags);
        other_abi.env.insert(WITHOUT.to_owned(), switched_off.join(","));
        let mut spec = other_abi.clone();
        if switched_off.is_empty() {
            spec = AgentSpec::new(&builds.release, &flags);
        }
        Ok(Self {
            lab,
            spec,
            other_abi: other_abi.of_next_abi(),
            agent: Mutex::default(),
            successors: AtomicU32::new(0),
        })
    }

    /// Starts the agent, in the place of its predecessor if there was one.
    pub(super) async fn start_agent(&self) -> anyhow::Result<()> {
        *self.agent.lock().await = Some(self.lab.start_agent(&self.spec).await?);
        Ok(())
    }

    /// Lets another agent, in a pod of its own, take over from the one that serves, and then ends that one: as a rolling
    /// update does.
    pub(super) async fn succeed_agent(&self) -> anyhow::Result<()> {
        self.succeed(&self.spec).await
    }

    /// The same with an agent of another ABI.
    pub(super) async fn succeed_agent_by_other_abi(&self) -> anyhow::Result<()> {
        self.succeed(&self.other_abi).await
    }

    async fn succeed(&self, spec: &AgentSpec) -> anyhow::Result<()> {
        let number = self.successors.fetch_add(1, Relaxed);
        let pod = self.lab.add_agent_pod(&format!("podgate-next{number}"))?;
        let next = self.lab.start_agent_in(&pod, spec).await?;
        let predecessor = self.agent.lock().await.replace(next).context("BUG: there is no agent")?;
        predecessor.stop().await.map(drop)
    }

    /// Kills the agent with -9.
    pub(super) async fn kill_agent(&self) -> anyhow::Result<()> {
        self.agent(async |agent| agent.kill().await).await?;
        *self.agent.lock().await = None;
        Ok(())
    }

    /// Does something to the agent.
    pub(super) async fn agent<T>(
        &self,
        work: impl AsyncFnOnce(&mut AgentProcess) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        work(self.agent.lock().await.as_mut().context("BUG: there is no agent")?).await
    }

    /// Takes everything down.
    pub(super) async fn down(self) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.into_inner() {
            agent.kill().await?;
        }
        self.lab.down()
    }

    /// The end of the agent's log.
    pub(super) async fn log_tail(&self) -> String {
        self.agent.lock().await.as_ref().map(AgentProcess::log_tail).unwrap_or_default()
    }

    /// A pod of the namespace `shop` that others are after, with a role of its own. It is served already: its credentials
    /// are cached, and its address is known.
    pub(super) async fn victim(&self) -> anyhow::Result<Pod> {
        let victim = self.lab.add_pod(&victim())?;
        self.until_served(&victim).await?;
        Ok(victim)
    }

    /// A pod of the namespace `evil`, with a role of its own.
    pub(super) fn attacker(&self) -> anyhow::Result<Pod> {
        self.lab.add_pod(&attacker())
    }

    /// A file that pods on this node share, as by a hostPath.
    pub(super) fn shared_file(&self, name: &str) -> PathBuf {
        let lab = self.lab.node.place.directory.file_name().unwrap_or_default();
        std::env::temp_dir().join(format!("podgate-{}-{name}", lab.display()))
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

/// The pod that others are after.
pub(super) fn victim() -> PodSpec {
    PodSpec::new("shop", "victim").role("victim-role")
}

/// The attacker's pod.
pub(super) fn attacker() -> PodSpec {
    PodSpec::new("evil", "attacker").role("attacker-role")
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
