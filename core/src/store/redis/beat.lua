-- Leaves word that the fleet lives, and in which life of the server. KEYS: the beat. ARGV: the life.
local time = redis.call('TIME')
redis.call('SET', KEYS[1], string.format('%d %s', time[1] * 1000 + math.floor(time[2] / 1000), ARGV[1]))
return 1
