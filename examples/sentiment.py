from parallax.sdk import SecureAgent


class Sentiment(SecureAgent):
    async def analyze(self, task, data):
        good = "great" in data["text"].lower()
        return {"mood": "good" if good else "unsure"}, 0.9


if __name__ == "__main__":
    agent = Sentiment("agent-1", "My agent", ["sentiment"])
    agent.run()
