//! A scene from its beginning to its end: the lab, the agent in it, and what is put right between two attempts.
//!
//! Owns the agents. Never judges an attack.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

use anyhow::{Context as _, bail};
use lab::{AgentProcess, AgentSpec, Lab, LabSpec, enter};
use tokio::sync::Mutex;

use super::Scene;
use crate::attack::{
    Builds, InAudit, Without,
    modes::Mode,
    plan::{self, Attempt, Build, Needs},
};

/// The environment of `podgate-undefended` that switches defenses off.
const WITHOUT: &str = "PODGATE_WITHOUT";
/// The namespaces of an attempt, but for its number.
const NAMESPACES: [&str; 3] = [plan::EVIL, super::VICTIMS, super::HONEST];
const IMDS: &str = "podgate.dev/imds";
const TOKENLESS: &str = "podgate.dev/tokenless";

impl Scene {
    /// A node without an agent yet.
    pub(in crate::attack) fn up(builds: &Builds, needs: &Needs) -> anyhow::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("attack-{}-{}", std::process::id(), NEXT.fetch_add(1, Relaxed));
        let spec = LabSpec { driver: needs.driver, ..LabSpec::new(&name, enter::OWN_EXECUTABLE) };
        let lab = Lab::up(spec)?;
        let mode = ["--imds", needs.mode.label()];
        let flags: Vec<_> = mode.into_iter().chain(needs.flags.iter().map(String::as_str)).collect();
        let binary = match needs.build {
            Build::Podgate => &builds.podgate,
            Build::Undefended => &builds.undefended,
        };
        Ok(Self {
            lab,
            number: 0,
            spec: AgentSpec::new(binary, &flags),
            other_abi: AgentSpec::new(&builds.undefended, &flags).of_next_abi(),
            build: needs.build,
            agent: Mutex::default(),
            successors: AtomicU32::new(0),
        })
    }

    /// Gives an attempt names of its own, and switches off what it is to do without: in the agent that runs, and in those
    /// that will.
    pub(in crate::attack) async fn begin_attempt(&mut self, attempt: &Attempt) -> anyhow::Result<()> {
        self.number = attempt.number;
        for namespace in NAMESPACES {
            let annotations = annotations(attempt, namespace);
            self.lab.cluster.add_namespace(&plan::namespace(namespace, self.number), annotations);
        }
        if attempt.mode == Mode::Audit && attempt.attack.pods == InAudit::Intercept {
            self.lab.add_pod(&self.pod_spec("plain", "plain"))?;
        }
        let defenses = attempt.without.iter().filter_map(|without| match *without {
            Without::Defense(defense) => Some(defense.label()),
            Without::Flags(..) | Without::Annotation(..) => None,
        });
        let off = defenses.collect::<Vec<_>>().join(",");
        for spec in [&mut self.spec, &mut self.other_abi] {
            spec.env.insert(WITHOUT.to_owned(), off.clone());
        }
        self.switch_off(&off).await
    }

    /// Removes an attempt's pods and switches every defense on again; an error if the lab is not as it was before: a pod
    /// that comes now must get its own role.
    pub(in crate::attack) async fn end_attempt(&mut self) -> anyhow::Result<()> {
        self.switch_off("").await?;
        self.delete_pods()?;
        let honest = self.lab.add_pod(&self.pod_spec(super::HONEST, "honest"))?;
        self.until_served(&honest).await?;
        self.lab.delete_pod(&honest)
    }

    fn delete_pods(&self) -> anyhow::Result<()> {
        let pods = self.lab.running_pods();
        pods.iter()
            .filter(|pod| pod.uid != self.lab.agent_pod.uid)
            .try_for_each(|pod| self.lab.delete_pod(pod))
    }

    /// Tells the agent, if there is one that can be told.
    async fn switch_off(&self, labels: &str) -> anyhow::Result<()> {
        if self.build == Build::Podgate || self.agent.lock().await.is_none() {
            return Ok(());
        }
        let answer = self.lab.node.ask_agent(&format!("/without/{labels}")).await?;
        if answer.status != 200 {
            bail!("the agent cannot do without {labels:?}: {}", answer.body);
        }
        Ok(())
    }

    /// Starts the agent, in the place of its predecessor if there was one.
    pub(in crate::attack) async fn start_agent(&self) -> anyhow::Result<()> {
        *self.agent.lock().await = Some(self.lab.start_agent(&self.spec).await?);
        Ok(())
    }

    /// Lets another agent, in a pod of its own, take over from the one that serves, and then ends that one: as a rolling
    /// update does.
    pub(in crate::attack) async fn succeed_agent(&self) -> anyhow::Result<()> {
        self.succeed(&self.spec).await
    }

    /// The same with an agent of another ABI.
    pub(in crate::attack) async fn succeed_agent_by_other_abi(&self) -> anyhow::Result<()> {
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
    pub(in crate::attack) async fn kill_agent(&self) -> anyhow::Result<()> {
        self.agent(async |agent| agent.kill().await).await?;
        *self.agent.lock().await = None;
        Ok(())
    }

    /// Does something to the agent.
    pub(in crate::attack) async fn agent<T>(
        &self,
        work: impl AsyncFnOnce(&mut AgentProcess) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        work(self.agent.lock().await.as_mut().context("BUG: there is no agent")?).await
    }

    /// Takes everything down.
    pub(in crate::attack) async fn down(self) -> anyhow::Result<()> {
        if let Some(mut agent) = self.agent.into_inner() {
            agent.kill().await?;
        }
        self.lab.down()
    }

    /// The end of the agent's log.
    pub(in crate::attack) async fn log_tail(&self) -> String {
        self.agent.lock().await.as_ref().map(AgentProcess::log_tail).unwrap_or_default()
    }
}

/// What an attempt's namespace says. Pods are served without a token in every mode, or what the kernel attests would open
/// nothing, unless the attack is about that.
fn annotations(attempt: &Attempt, namespace: &str) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    let mut add = |key: &str, value: &str| annotations.insert(key.to_owned(), value.to_owned());
    if attempt.mode == Mode::Audit && attempt.attack.pods == InAudit::Intercept {
        add(IMDS, Mode::Intercept.label());
    }
    let is_about_tokens =
        attempt.attack.without.iter().any(|without| matches!(without, Without::Annotation(TOKENLESS, _)));
    if attempt.mode != Mode::Intercept && !(is_about_tokens && namespace == plan::EVIL) {
        add(TOKENLESS, "allow");
    }
    for without in attempt.without {
        if let Without::Annotation(key, value) = *without
            && namespace == plan::EVIL
        {
            add(key, value);
        }
    }
    annotations
}
