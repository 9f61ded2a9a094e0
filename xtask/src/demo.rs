//! `cargo xtask demo`: real, unmodified clients in pods with nothing injected get their own role.
//!
//! Owns the story: which client asks from where, and what it must get. The verdict of each row comes from the
//! simulated AWS side: whose role was handed out under the access key that the client shows.

mod attempt;
mod case;
mod table;

use std::{process::ExitCode, time::Duration};

use anyhow::{Context as _, bail};
use lab::{AgentProcess, AgentSpec, EnvKind, Lab, LabSpec, Pod, PodSpec, enter};
use tokio::signal::unix::{SignalKind, signal};

use self::{
    attempt::{Attempt, IMDS, Source},
    case::{Case, Expected, Row},
};
use crate::{
    clients::Clients,
    ebpf, privilege,
    setup::{Build, Plan},
};

/// What the clients take, all together.
const RUNS: Duration = Duration::from_secs(20);
const NAMESPACE: &str = "shop";
const IMDS_ADDRESS: &str = "169.254.169.254";
const POD_IDENTITY_ADDRESS: &str = "169.254.170.23";
const MAPPED_ADDRESS: &str = "::ffff:169.254.169.254";
/// A pod without an association must be refused within this time.
const REFUSAL_MILLISECONDS: f64 = 100.0;

/// Builds everything, runs the clients, prints the table. Fails unless every row is as expected.
pub(crate) fn run(json: bool) -> anyhow::Result<ExitCode> {
    privilege::require_root("the demo")?;
    Plan::new("The demo puts real clients on a simulated node and shows whose role each gets.", RUNS)
        .needs(ebpf::missing_tools()?)
        .needs(Clients::missing())
        .builds([Build::KernelPrograms, Build::Agent])
        .begin()?;
    let agent = AgentSpec::new(ebpf::build_agent()?, &["--imds", "intercept"]);
    let clients = Clients::prepare()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rows = runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            rows = on_a_lab(&agent, &clients) => rows,
            _ = tokio::signal::ctrl_c() => bail!("interrupted; the simulated node was removed"),
            _ = terminate.recv() => bail!("terminated; the simulated node was removed"),
        }
    })?;
    let expected = rows.iter().all(Row::is_expected);
    if json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        table::print(&rows);
    }
    Ok(if expected { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Brings the node up, lets every client try, takes the node down.
async fn on_a_lab(agent: &AgentSpec, clients: &Clients) -> anyhow::Result<Vec<Row>> {
    let name = format!("demo-{}", std::process::id());
    let lab = Lab::up(LabSpec::new(&name, enter::OWN_EXECUTABLE))?;
    let spec = agent;
    let mut agent = lab.start_agent(spec).await?;
    let demo = Demo { lab: &lab, clients };
    let rows = async {
        let mut rows = demo.rows().await?;
        rows.extend(demo.killed_and_back(&mut agent, spec).await?);
        Ok(rows)
    };
    let rows: anyhow::Result<Vec<Row>> = rows.await;
    let rows = match rows {
        Ok(rows) if rows.iter().all(Row::is_expected) => rows,
        unexpected => {
            eprintln!("the end of the agent's log:\n{}", agent.log_tail());
            unexpected?
        }
    };
    let status = agent.stop().await?;
    if !status.success() {
        bail!("the agent did not stop cleanly: {status}");
    }
    lab.down().context("the simulated node could not be removed")?;
    Ok(rows)
}

struct Demo<'a> {
    lab: &'a Lab,
    clients: &'a Clients,
}

// === impl Demo ===

impl Demo<'_> {
    async fn rows(&self) -> anyhow::Result<Vec<Row>> {
        self.let_the_agent_sign_once("first").await?;
        let mut rows = vec![self.old_sdk().await?];
        rows.extend(self.imds_v1().await?);
        rows.push(self.current_sdk().await?);
        rows.push(self.without_token().await?);
        rows.push(self.dual_stack().await?);
        rows.extend(self.at_the_same_instant().await?);
        rows.extend(self.not_associated().await?);
        rows.push(self.outside_any_pod().await?);
        Ok(rows)
    }

    /// The agent reads the node's credentials, for itself, when it first calls EKS Auth. After this every read
    /// is a pod's, and wrong.
    async fn let_the_agent_sign_once(&self, name: &str) -> anyhow::Result<()> {
        let pod = self.pod_with_role(name)?;
        let attempt = attempt::pod_identity(self.lab, Source::Pod(&pod)).await?;
        if attempt.access_key_id.is_none() {
            bail!("the pod {name} got no credentials: {}", attempt.message);
        }
        Ok(())
    }

    /// 1. An SDK that predates Pod Identity, through IMDSv2, with no environment.
    async fn old_sdk(&self) -> anyhow::Result<Row> {
        let pod = self.pod_with_role("orders")?;
        let case = Case::new("1", Source::Pod(&pod), IMDS_ADDRESS, "IMDSv2", Expected::OwnRole);
        let reads = self.lab.imds.credential_reads();
        let attempt = attempt::boto3(self.lab, &pod, EnvKind::None, &self.clients.boto3_old).await?;
        Ok(self.judge(&case, attempt, reads))
    }

    /// 2. IMDSv1, where the pod's annotation allows it and where none does.
    async fn imds_v1(&self) -> anyhow::Result<Vec<Row>> {
        let spec = PodSpec::new(NAMESPACE, "reports").role("reports-role");
        let allowed = self.lab.add_pod(&spec.annotation("podgate.dev/imds-v1", "allow"))?;
        let refused = self.pod_with_role("invoices")?;
        let mut rows = Vec::new();
        for (number, pod, expected) in [
            ("2a", &allowed, Expected::OwnRole),
            ("2b", &refused, Expected::Refusal { naming: vec!["podgate.dev/imds-v1".into()], within: None }),
        ] {
            let case = Case::new(number, Source::Pod(pod), IMDS_ADDRESS, "IMDSv1", expected);
            let reads = self.lab.imds.credential_reads();
            let attempt = attempt::imds_v1(self.lab, case.source).await?;
            rows.push(self.judge(&case, attempt, reads));
        }
        Ok(rows)
    }

    /// 3. A current SDK with the webhook's environment and token file.
    async fn current_sdk(&self) -> anyhow::Result<Row> {
        let pod =
            self.lab.add_pod(&PodSpec::new(NAMESPACE, "payments").role("payments-role").with_token())?;
        let case =
            Case::new("3", Source::Pod(&pod), POD_IDENTITY_ADDRESS, "Pod Identity, token", Expected::OwnRole);
        let reads = self.lab.imds.credential_reads();
        let attempt = attempt::boto3(self.lab, &pod, EnvKind::Webhook, &self.clients.boto3_current).await?;
        Ok(self.judge(&case, attempt, reads))
    }

    /// 4. The Pod Identity endpoint without a token: the cgroup alone says who asks.
    async fn without_token(&self) -> anyhow::Result<Row> {
        let pod = self.pod_with_role("search")?;
        let case = Case::new("4", Source::Pod(&pod), POD_IDENTITY_ADDRESS, "Pod Identity", Expected::OwnRole);
        let reads = self.lab.imds.credential_reads();
        let attempt = attempt::pod_identity(self.lab, case.source).await?;
        Ok(self.judge(&case, attempt, reads))
    }

    /// 5. A dual-stack socket that connects to the v4-mapped address, as the JVM's do.
    async fn dual_stack(&self) -> anyhow::Result<Row> {
        let pod = self.pod_with_role("catalog")?;
        let case = Case::new("5", Source::Pod(&pod), MAPPED_ADDRESS, "IMDSv2", Expected::OwnRole);
        let reads = self.lab.imds.credential_reads();
        // The URL, and with it the Host header, stays as the SDKs have it; the socket is AF_INET6.
        let connect_to = format!("{}:80:[{MAPPED_ADDRESS}]:80", IMDS.trim_start_matches("http://"));
        let attempt = attempt::imds_v2(self.lab, case.source, &["--connect-to", &connect_to]).await?;
        Ok(self.judge(&case, attempt, reads))
    }

    /// 6. Two pods of different service accounts, at the same instant.
    async fn at_the_same_instant(&self) -> anyhow::Result<Vec<Row>> {
        let pods = [self.pod_with_role("east")?, self.pod_with_role("west")?];
        let reads = self.lab.imds.credential_reads();
        let attempts = attempt::boto3_at_once(self.lab, &pods.each_ref(), &self.clients.boto3_old).await?;
        let rows = ["6a", "6b"].into_iter().zip(&pods).zip(attempts).map(|((number, pod), attempt)| {
            let case = Case::new(number, Source::Pod(pod), IMDS_ADDRESS, "IMDSv2", Expected::OwnRole);
            self.judge(&case, attempt, reads)
        });
        Ok(rows.collect())
    }

    /// 7. A pod whose service account has no association: told why, and given nothing at the address where the
    ///    node's role would be.
    async fn not_associated(&self) -> anyhow::Result<Vec<Row>> {
        let pod = self.lab.add_pod(&PodSpec::new(NAMESPACE, "unassociated"))?;
        let expected = Expected::Refusal {
            naming: vec![pod.namespace.clone(), pod.service_account.clone()],
            within: Some(REFUSAL_MILLISECONDS),
        };
        let case = Case::new("7a", Source::Pod(&pod), POD_IDENTITY_ADDRESS, "Pod Identity", expected);
        let reads = self.lab.imds.credential_reads();
        let attempt = attempt::pod_identity(self.lab, case.source).await?;
        let told = self.judge(&case, attempt, reads);
        let expected = Expected::Refusal { naming: vec![], within: None };
        let case = Case::new("7b", Source::Pod(&pod), IMDS_ADDRESS, "IMDSv2", expected);
        let attempt = attempt::boto3(self.lab, &pod, EnvKind::None, &self.clients.boto3_old).await?;
        Ok(vec![told, self.judge(&case, attempt, reads)])
    }

    /// 8. A process outside any pod.
    async fn outside_any_pod(&self) -> anyhow::Result<Row> {
        let case = Case::new("8", Source::Node, IMDS_ADDRESS, "IMDSv2", Expected::NodeRole);
        let reads = self.lab.imds.credential_reads();
        let attempt = attempt::imds_v2(self.lab, Source::Node, &[]).await?;
        Ok(self.judge(&case, attempt, reads))
    }

    /// 9. The agent is killed with -9: pods are refused at once at either address, and served when it is back.
    async fn killed_and_back(&self, agent: &mut AgentProcess, spec: &AgentSpec) -> anyhow::Result<Vec<Row>> {
        let pod = self.pod_with_role("basket")?;
        let source = Source::Pod(&pod);
        let reads = self.lab.imds.credential_reads();
        agent.kill().await?;
        let expected = || Expected::NoConnection { within: REFUSAL_MILLISECONDS };
        let case = Case::new("9a", source, IMDS_ADDRESS, "agent killed", expected());
        let mut rows = vec![self.judge(&case, attempt::imds_v2(self.lab, source, &[]).await?, reads)];
        let case = Case::new("9b", source, POD_IDENTITY_ADDRESS, "agent killed", expected());
        rows.push(self.judge(&case, attempt::pod_identity(self.lab, source).await?, reads));
        *agent = self.lab.start_agent(spec).await?;
        self.let_the_agent_sign_once("second").await?;
        let reads = self.lab.imds.credential_reads();
        let case = Case::new("9c", source, IMDS_ADDRESS, "IMDSv2, agent back", Expected::OwnRole);
        rows.push(self.judge(&case, attempt::imds_v2(self.lab, source, &[]).await?, reads));
        Ok(rows)
    }

    fn pod_with_role(&self, name: &str) -> anyhow::Result<Pod> {
        self.lab.add_pod(&PodSpec::new(NAMESPACE, name).role(&format!("{name}-role")))
    }

    fn judge(&self, case: &Case<'_>, mut attempt: Attempt, reads_before: u64) -> Row {
        attempt.version.get_or_insert_with(|| self.clients.curl_version.clone());
        let found = case::Found {
            issued: attempt.access_key_id.as_deref().and_then(|key| self.lab.eks_auth.issued(key)),
            node_reads: self.lab.imds.credential_reads() - reads_before,
        };
        Row::new(case, attempt, &found)
    }
}
