//! A running lab is told what to break, add and restart.

use std::collections::BTreeMap;

use lab::{
    EnvKind, Lab, LabSpec, Pod,
    remote_control::{self, ControlServer, NewAgent, NewPod, Request, Status},
    switches::Setting,
};
use serde::de::DeserializeOwned;

use crate::lab_node::{self, HELPER, POD_IDENTITY};

/// A lab without pods that takes commands, and `steps` with it.
async fn commanded(
    steps: impl AsyncFnOnce(&Lab, &Remote) -> anyhow::Result<()>,
    with_agent: bool,
) -> anyhow::Result<()> {
    let name = lab_node::lab_name();
    let lab = Lab::up(LabSpec::new(&name, HELPER))?;
    let mut server = ControlServer::bind(&lab, &["--imds", "intercept"])?;
    if with_agent {
        server.start_agent(NewAgent { binary: Some(lab_node::agent_binary()?), flags: None }).await?;
    }
    let remote = Remote { name };
    tokio::select! {
        done = steps(&lab, &remote) => done?,
        ended = server.run() => match ended? {},
    }
    server.stop_agent().await?;
    drop(server);
    lab.down()
}

/// The lab as another process sees it.
struct Remote {
    name: String,
}

// === impl Remote ===

impl Remote {
    async fn ask<T: DeserializeOwned + Send + 'static>(&self, request: Request) -> anyhow::Result<T> {
        let name = self.name.clone();
        tokio::task::spawn_blocking(move || remote_control::ask(&name, &request)).await?
    }

    async fn refusal(&self, request: Request) -> String {
        match self.ask::<serde_json::Value>(request).await {
            Ok(answer) => panic!("the lab has done it: {answer}"),
            Err(refusal) => format!("{refusal:#}"),
        }
    }

    async fn add(&self, name: &str) -> anyhow::Result<Pod> {
        self.ask(Request::AddPod(new_pod(name))).await
    }
}

fn new_pod(name: &str) -> NewPod {
    NewPod {
        namespace: "shop".to_owned(),
        name: name.to_owned(),
        role: Some(format!("{name}-role")),
        ..NewPod::default()
    }
}

/// The HTTP status that a pod gets from the Pod Identity endpoint.
async fn status(lab: &Lab, pod: &Pod) -> anyhow::Result<String> {
    let curl = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", POD_IDENTITY];
    lab_node::text(lab.exec(pod, EnvKind::None, &curl)?).await
}

fn fault(name: &str) -> Request {
    Request::FaultOn { name: name.to_owned(), setting: Setting::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fault_breaks_what_it_names_until_it_is_turned_off() -> anyhow::Result<()> {
    let steps = async |lab: &Lab, remote: &Remote| {
        let pod = remote.add("unlucky").await?;
        remote.ask::<Setting>(fault("eks-auth-access-denied")).await?;
        assert!(status(lab, &pod).await?.starts_with(['4', '5']));
        let state: Status = remote.ask(Request::Status).await?;
        let on: Vec<_> = state.switches.iter().filter(|switch| switch.on.is_some()).collect();
        assert_eq!(on.len(), 1, "{on:?}");
        // Another pod: the agent may remember the refusal of the first.
        remote.ask::<()>(Request::FaultOff { name: None }).await?;
        let other = remote.add("lucky").await?;
        assert_eq!(status(lab, &other).await?, "200");
        Ok(())
    };
    commanded(steps, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_and_associations_come_and_go_by_command() -> anyhow::Result<()> {
    let steps = async |lab: &Lab, remote: &Remote| {
        let pod = remote.add("short-lived").await?;
        assert_eq!(status(lab, &pod).await?, "200");
        let (namespace, service_account) = ("shop".to_owned(), "short-lived".to_owned());
        remote.ask::<()>(Request::Dissociate { namespace, service_account }).await?;
        assert_eq!(lab.pod("short-lived")?.role, None);
        assert!(remote.refusal(Request::AddPod(new_pod("short-lived"))).await.contains("already"));
        remote.ask::<()>(Request::RemovePod { pod: "short-lived".to_owned() }).await?;
        assert!(lab.pod("short-lived").is_err());
        let refusal = remote.refusal(Request::RemovePod { pod: lab.agent_pod.full_name() }).await;
        assert!(refusal.contains("agent's own"), "{refusal}");
        Ok(())
    };
    commanded(steps, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_is_killed_and_started_with_other_flags() -> anyhow::Result<()> {
    let steps = async |lab: &Lab, remote: &Remote| {
        let killed: String = remote.ask(Request::KillAgent).await?;
        assert!(killed.contains("signal"), "{killed}");
        assert!(remote.refusal(Request::StopAgent).await.contains("not running"));
        let flags = Some(vec!["--log-format".to_owned(), "text".to_owned()]);
        remote.ask::<u32>(Request::StartAgent(NewAgent { binary: None, flags })).await?;
        let state: Status = remote.ask(Request::Status).await?;
        assert_eq!(state.agent_flags, ["--imds", "intercept", "--log-format", "text"]);
        let metrics: String = remote.ask(Request::Metrics).await?;
        assert!(metrics.contains("podgate_"), "{metrics}");
        let pod = remote.add("served").await?;
        assert_eq!(status(lab, &pod).await?, "200");
        Ok(())
    };
    commanded(steps, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_cannot_be_carried_out_says_why() -> anyhow::Result<()> {
    let steps = async |_: &Lab, remote: &Remote| {
        let annotations: BTreeMap<_, _> = [("k".to_owned(), None)].into();
        let namespace = "nowhere".to_owned();
        let setting = || Setting { value: Some("soon".to_owned()), ratio: None };
        let on = |name: &str| Request::FaultOn { name: name.to_owned(), setting: setting() };
        for (request, word) in [
            (Request::FaultOff { name: Some("gremlins".to_owned()) }, "gremlins"),
            (on("eks-auth-latency"), "soon"),
            (on("eks-auth-drop"), "takes no value"),
            (Request::RemovePod { pod: "nobody".to_owned() }, "has no pod nobody"),
            (Request::AnnotateNamespace { namespace, annotations }, "no namespace nowhere"),
            (Request::AddPod(NewPod { name: "../x".to_owned(), ..new_pod("x") }), "a pod's name"),
            (Request::StartAgent(NewAgent::default()), "--build"),
        ] {
            let refusal = remote.refusal(request).await;
            assert!(refusal.contains(word), "{word}: {refusal}");
        }
        Ok(())
    };
    commanded(steps, false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lab_that_is_not_up_or_takes_no_commands_is_an_error() -> anyhow::Result<()> {
    let remote = Remote { name: lab_node::lab_name() };
    assert!(remote.refusal(Request::Status).await.contains("there is no lab"));
    let lab = Lab::up(LabSpec::new(&remote.name, HELPER))?;
    assert!(remote.refusal(Request::Status).await.contains("takes no commands"));
    lab.down()
}
