use std::net::Ipv4Addr;

use agent_common::net::Endpoint;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use super::*;
use crate::{
    intercept::Standing,
    testing::{FakeOrigins, fake_node::FakeDataplane},
};

/// An agent that serves, and what a test sees of it.
struct Scene {
    dataplane: Arc<FakeDataplane>,
    active: watch::Receiver<bool>,
    eks_agent_is_here: watch::Sender<bool>,
    ready: Arc<AtomicBool>,
    shutdown: Option<oneshot::Sender<()>>,
    running: JoinHandle<Result<(), Error>>,
}

impl Scene {
    async fn start(target: TargetMode) -> Self {
        let settings = Settings {
            target,
            target_v4: Some(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)),
            target_v6: None,
            when_down: WhenDown::Deny,
            drain: Duration::from_millis(10),
        };
        let dataplane = Arc::<FakeDataplane>::default();
        let (active, is_active) = watch::channel(false);
        let (eks_agent_is_here, is_here) = watch::channel(false);
        let ready = Arc::<AtomicBool>::default();
        let parts = Parts {
            dataplane: Arc::clone(&dataplane),
            origins: Arc::new(Arc::<FakeOrigins>::default()),
            serve: Arc::new(|_, _| None),
            eks_agent_is_here: is_here,
            ready: Arc::clone(&ready),
            active,
            pod_listeners: PodListeners::none(),
        };
        let (shutdown, received) = oneshot::channel();
        let running = tokio::spawn(async move {
            let mut tasks = Tasks::default();
            let takeover = Takeover::bind(settings, parts, &mut tasks).await?;
            takeover.run(&mut tasks, async { drop(received.await) }).await
        });
        let mut scene = Self {
            dataplane,
            active: is_active,
            eks_agent_is_here,
            ready,
            shutdown: Some(shutdown),
            running,
        };
        scene.expect_active(true).await;
        scene
    }

    /// Waits until it is active, or is not.
    async fn expect_active(&mut self, expected: bool) {
        let active = self.active.wait_for(|active| *active == expected);
        timeout(Duration::from_secs(5), active).await.unwrap().unwrap();
    }

    async fn ended(self) -> Result<(), Error> {
        timeout(Duration::from_secs(5), self.running).await.unwrap().unwrap()
    }

    /// Waits for a target for which this holds.
    async fn target(&self, holds: impl Fn(&Target) -> bool) -> Target {
        let mut targets = self.dataplane.targets();
        let target = targets.wait_for(|target| target.as_ref().is_some_and(&holds));
        timeout(Duration::from_secs(5), target).await.unwrap().unwrap().unwrap()
    }
}

#[tokio::test]
async fn a_superseded_agent_stands_by_and_takes_back_when_it_is_silent() {
    let mut scene = Scene::start(TargetMode::Own).await;
    assert_eq!(scene.dataplane.take_overs(), 1);
    scene.dataplane.set_standing(Standing::Superseded { silent: Duration::from_millis(900) });
    scene.expect_active(false).await;
    assert_eq!(scene.dataplane.take_overs(), 1);
    assert!(scene.ready.load(Relaxed), "it serves what reaches it");
    scene.dataplane.set_standing(Standing::Superseded { silent: Duration::from_secs(1) });
    scene.expect_active(true).await;
    assert!(scene.dataplane.take_overs() > 1);
}

#[tokio::test]
async fn a_detached_agent_stops_without_a_word_to_the_kernel() {
    let scene = Scene::start(TargetMode::Own).await;
    let (dataplane, ready) = (Arc::clone(&scene.dataplane), Arc::clone(&scene.ready));
    dataplane.set_standing(Standing::Detached);
    assert!(matches!(scene.ended().await, Err(Error::Detached)));
    assert_eq!(dataplane.stops(), 0);
    assert!(!ready.load(Relaxed));
}

#[tokio::test]
async fn at_shutdown_the_kernel_is_told() {
    let mut scene = Scene::start(TargetMode::Own).await;
    let dataplane = Arc::clone(&scene.dataplane);
    scene.shutdown.take().unwrap().send(()).unwrap();
    scene.ended().await.unwrap();
    assert_eq!(dataplane.stops(), 1);
}

#[tokio::test]
async fn eks_pod_identitys_addresses_are_left_to_its_own_agent() {
    let scene = Scene::start(TargetMode::Auto).await;
    let pod_identity = scene.target(|target| target.v4 != Endpoint::NONE).await;
    scene.eks_agent_is_here.send_replace(true);
    let own = scene.target(|target| target.v4 != pod_identity.v4).await;
    scene.eks_agent_is_here.send_replace(false);
    scene.target(|target| target.v4 != own.v4).await;
}
