// One question to an OpenAI-style server: Chat URL QUESTION.
// DataContractJsonSerializer is in .NET and in Mono alike; where only .NET matters, System.Text.Json is shorter.
using System;
using System.IO;
using System.Net.Http;
using System.Runtime.Serialization;
using System.Runtime.Serialization.Json;
using System.Text;
using System.Threading.Tasks;

[DataContract]
public class Message
{
    [DataMember(Name = "role")] public string Role { get; set; }
    [DataMember(Name = "content")] public string Content { get; set; }
}

[DataContract]
public class Question
{
    [DataMember(Name = "model")] public string Model { get; set; }
    [DataMember(Name = "messages")] public Message[] Messages { get; set; }
    [DataMember(Name = "temperature")] public int Temperature { get; set; }
    [DataMember(Name = "max_tokens")] public int MaxTokens { get; set; }
}

[DataContract]
public class Choice
{
    [DataMember(Name = "message")] public Message Message { get; set; }
}

[DataContract]
public class Reply
{
    [DataMember(Name = "choices")] public Choice[] Choices { get; set; }
}

public static class Chat
{
    public static int Main(string[] args)
    {
        return Ask(args[0], args[1]).GetAwaiter().GetResult();
    }

    private static async Task<int> Ask(string url, string text)
    {
        var question = new Question
        {
            Model = "edgehome",
            Messages = new[] { new Message { Role = "user", Content = text } },
            Temperature = 0,
            MaxTokens = 64,
        };
        using (var client = new HttpClient { Timeout = TimeSpan.FromSeconds(60) })
        {
            var body = new StringContent(Write(question), Encoding.UTF8, "application/json");
            var answer = await client.PostAsync(url + "/v1/chat/completions", body);
            var said = await answer.Content.ReadAsStringAsync();
            if (!answer.IsSuccessStatusCode)
            {
                Console.Error.WriteLine((int)answer.StatusCode + ": " + said);
                return 1;
            }
            Console.WriteLine(Read<Reply>(said).Choices[0].Message.Content);
            return 0;
        }
    }

    private static string Write<T>(T value)
    {
        using (var stream = new MemoryStream())
        {
            new DataContractJsonSerializer(typeof(T)).WriteObject(stream, value);
            return Encoding.UTF8.GetString(stream.ToArray());
        }
    }

    private static T Read<T>(string text)
    {
        using (var stream = new MemoryStream(Encoding.UTF8.GetBytes(text)))
        {
            return (T)new DataContractJsonSerializer(typeof(T)).ReadObject(stream);
        }
    }
}
