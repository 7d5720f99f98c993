//! A script that the server runs: sent by its hash, and whole where the server does not know it yet.

use redis::{Cmd, ErrorKind, RedisResult, ServerErrorKind, Value};

use crate::redis::Servers;

pub(super) struct Script {
    text: &'static str,
    hash: String,
}

impl Script {
    pub(super) fn new(text: &'static str) -> Self {
        Self { text, hash: redis::Script::new(text).get_hash().to_owned() }
    }

    pub(super) fn call<'a>(&'a self, key: &'a str, arguments: impl FnOnce(&mut Cmd)) -> ScriptCall<'a> {
        let mut by_hash = redis::cmd("EVALSHA");
        by_hash.arg(&self.hash).arg(1).arg(key);
        arguments(&mut by_hash);
        ScriptCall { key, by_hash, script: self }
    }
}

pub(super) struct ScriptCall<'a> {
    key: &'a str,
    by_hash: Cmd,
    script: &'a Script,
}

impl ScriptCall<'_> {
    pub(super) async fn run(&self, servers: &Servers, settled_only: bool) -> RedisResult<Value> {
        match servers.command(self.key, &self.by_hash, settled_only).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let mut whole = redis::cmd("EVAL");
                whole.arg(self.script.text);
                for argument in self.by_hash.args_iter().skip(2) {
                    if let redis::Arg::Simple(argument) = argument {
                        whole.arg(argument);
                    }
                }
                servers.command(self.key, &whole, settled_only).await
            }
            outcome => outcome,
        }
    }
}
