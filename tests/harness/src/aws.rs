//! The simulated AWS, in this process or in one of its own, and what its device shows.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use latchkey_aws_simulator::{Clock, CodeOfDevice, Facts, Simulator, World};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::process::{Logs, Process};
use crate::program::Programs;
use crate::wait::{LIMIT, wait_for};

/// A code that is about to leave the window is not handed out.
const MARGIN_SECONDS: i64 = 3;

/// A simulated AWS.
#[derive(Debug)]
pub struct Aws {
    facts: Facts,
    running: Running,
}

#[derive(Debug)]
enum Running {
    InProcess(Box<Simulator>),
    Process(Box<Process>),
}

impl Aws {
    /// Starts it in this process, where a test can look inside.
    pub async fn in_process(world: World) -> anyhow::Result<Self> {
        let simulator = Simulator::start(world, Clock::wall()).await?;
        Ok(Self { facts: simulator.facts(), running: Running::InProcess(Box::new(simulator)) })
    }

    /// Starts it as a process.
    pub async fn process(programs: &Programs, directory: &Path) -> anyhow::Result<Self> {
        let ready = directory.join("aws.json");
        let mut command = programs.aws_simulator().command();
        command.arg("--ready-file").arg(&ready);
        let logs = Logs::within(&directory.join("logs"), "aws-simulator");
        let mut process = Process::start("the simulated AWS", command, logs)?;
        let facts = serde_json::from_slice(&process.wait_for_file(&ready).await?)
            .context("failed to understand the facts of the simulated AWS")?;
        Ok(Self { facts, running: Running::Process(Box::new(process)) })
    }

    /// Address, key, secret and serial of the first user.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The simulation, to count requests, script faults and change the world.
    ///
    /// # Panics
    ///
    /// When it runs as a process of its own.
    #[track_caller]
    pub fn simulator(&self) -> &Simulator {
        match &self.running {
            Running::InProcess(simulator) => simulator,
            Running::Process(_) => panic!("this simulation is a process of its own"),
        }
    }

    /// Returns a code of the first user's device that STS will accept: nobody waits for the next
    /// thirty seconds, since up to five are good at any time.
    pub async fn unused_code(&self) -> anyhow::Result<String> {
        unused_code(self.facts.address, &self.facts.mfa_serial).await
    }

    /// The same for the device of another user.
    pub async fn unused_code_of(&self, serial: &str) -> anyhow::Result<String> {
        unused_code(self.facts.address, serial).await
    }

    /// Counts the requests that carried a code, whatever came of them.
    pub async fn requests_with_code(&self, code: &str) -> anyhow::Result<u64> {
        let counts = control(self.facts.address, &format!("counts?code={code}")).await;
        let counts = counts.map_err(anyhow::Error::msg)?;
        counts["count"].as_u64().context("the simulated AWS counts otherwise")
    }

    /// Says whether the simulation still runs.
    pub fn is_running(&mut self) -> bool {
        match &mut self.running {
            Running::InProcess(_) => true,
            Running::Process(process) => process.is_running(),
        }
    }

    /// Returns six digits that no step near this one has.
    pub async fn wrong_code(&self) -> anyhow::Result<String> {
        let (address, serial) = (self.facts.address, &self.facts.mfa_serial);
        let mut right = Vec::new();
        for offset in -4..=4 {
            let path = format!("code?serial={serial}&offset={offset}");
            right.push(code(address, &path).await.map_err(anyhow::Error::msg)?.code);
        }
        // Ten candidates, nine right codes: one is left.
        let mut candidates = (0..=9).map(|digit| digit.to_string().repeat(6));
        candidates.find(|candidate| !right.contains(candidate)).context("all codes are right")
    }
}

/// Asks a simulation, wherever it runs, for a code that is good for a while.
pub(crate) async fn unused_code(address: SocketAddr, serial: &str) -> anyhow::Result<String> {
    wait_for("a code that can be used", LIMIT, async || {
        let current = code(address, &format!("code?serial={serial}")).await?;
        let unused = code(address, &format!("code?serial={serial}&unused=true")).await?;
        let oldest = current.step - latchkey_aws_simulator::device::WINDOW_STEPS;
        if unused.step <= oldest && current.seconds_until_next <= MARGIN_SECONDS {
            return Err("only one that is about to expire".to_owned());
        }
        Ok(unused.code)
    })
    .await
}

impl Aws {
    /// Asks a simulation that somebody else started, such as `cargo dev`'s.
    pub async fn code_at(address: SocketAddr) -> anyhow::Result<String> {
        let facts = control(address, "facts").await.map_err(anyhow::Error::msg)?;
        let facts: Facts = serde_json::from_value(facts).context("failed to understand it")?;
        unused_code(address, &facts.mfa_serial).await
    }
}

async fn code(address: SocketAddr, path: &str) -> Result<CodeOfDevice, String> {
    serde_json::from_value(control(address, path).await?).map_err(|error| error.to_string())
}

/// Asks the control API. One request a connection is all that is needed of HTTP here.
async fn control(address: SocketAddr, path: &str) -> Result<Value, String> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!(
            "GET /_simulator/{path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(10), exchange)
        .await
        .map_err(|_| "the simulated AWS does not answer".to_owned())?
        .map_err(|error| format!("the simulated AWS cannot be reached: {error}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("it answered no HTTP")?;
    if !head.starts_with("HTTP/1.1 200") {
        return Err(format!("{}: {body}", head.lines().next().unwrap_or_default()));
    }
    serde_json::from_str(body).map_err(|error| error.to_string())
}
